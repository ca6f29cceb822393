//! The agent as an ordinary process over a unix socket: every law of exec that it implements has a test named after
//! it, beside those for bad input and for what a client can do wrong. Needs no root.

mod client;
mod complaints;
mod control;
mod exec;
mod files;
mod hostile;
mod laws;
mod sessions;
mod terminal;
