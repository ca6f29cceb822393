//! The whole product in real VMs, on the engine that AIRLOCK_TEST_ENGINE names. One binary, because each costs a link.

mod exec;
mod faults;
mod files;
mod images;
mod lifecycle;
mod loops;
mod python_client;
mod resume;
mod sessions;
