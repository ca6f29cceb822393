//! airlock's virtual machine monitor: one process, one VM.
//!
//! `vm.rs` boots a machine as one readable page; everything else is a leaf of it. Only `config` is meant for other
//! crates. No tokio, no clap: threads and one event loop.

#![deny(
    clippy::print_stderr,
    reason = "eprintln! panics when the log's disk is full; tell! does not"
)]

pub mod boot;
pub mod bus;
pub mod config;
pub mod console_log;
pub mod control;
pub mod devices;
pub mod event_loop;
mod guest_log;
pub mod halt;
pub mod kvm;
pub mod layout;
pub mod lifeline;
pub mod machine;
pub mod memory;
pub mod probe;
pub mod qemu;
pub mod run_dir;
pub mod seccomp;
pub mod tell;
pub mod vcpu;
pub mod vhost_user;
pub mod vm;
