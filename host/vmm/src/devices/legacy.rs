//! What is left of a PC: the serial port that the console is, and the keyboard controller that resets.

use std::convert::Infallible;
use std::io;
use std::sync::Arc;

use vm_superio::serial::NoEvents;
use vm_superio::{I8042Device, Serial, Trigger};
use vmm_sys_util::eventfd::{EFD_CLOEXEC, EFD_NONBLOCK, EventFd};

use crate::bus::BusDevice;
use crate::console_log::ConsoleLog;
use crate::machine::{ExitReason, ExitSlot};

/// 16550 with the console log at its other end; nothing is ever received.
#[derive(Debug)]
pub struct SerialPort(Serial<Edge, NoEvents, ConsoleLog>);

impl SerialPort {
    /// A port that writes to `log`.
    pub fn new(log: ConsoleLog) -> io::Result<Self> {
        Ok(Self(Serial::new(
            Edge(EventFd::new(EFD_NONBLOCK | EFD_CLOEXEC)?),
            log,
        )))
    }

    /// The edge of its interrupt line: to be an irqfd.
    pub fn interrupt_edge(&self) -> &EventFd {
        &self.0.interrupt_evt().0
    }
}

impl BusDevice for SerialPort {
    fn read(&mut self, offset: u64, data: &mut [u8]) {
        data.fill(self.0.read(offset as u8));
    }

    fn write(&mut self, offset: u64, data: &[u8]) {
        for &byte in data {
            // A full disk must not stop the guest: the log then lacks a byte.
            let _ = self.0.write(offset as u8, byte);
        }
    }
}

#[derive(Debug)]
struct Edge(EventFd);

impl Trigger for Edge {
    type E = io::Error;

    fn trigger(&self) -> io::Result<()> {
        self.0.write(1)
    }
}

/// Keyboard controller without keyboard: its reset line works, and ends the VM.
#[derive(Debug)]
pub struct ResetController(I8042Device<ResetLine>);

impl ResetController {
    /// Reports a reset to `exit`.
    pub fn new(exit: Arc<ExitSlot>) -> Self {
        Self(I8042Device::new(ResetLine(exit)))
    }
}

impl BusDevice for ResetController {
    fn read(&mut self, offset: u64, data: &mut [u8]) {
        data.fill(self.0.read(offset as u8));
    }

    fn write(&mut self, offset: u64, data: &[u8]) {
        for &byte in data {
            // Cannot fail.
            let _ = self.0.write(offset as u8, byte);
        }
    }
}

#[derive(Debug)]
struct ResetLine(Arc<ExitSlot>);

impl Trigger for ResetLine {
    type E = Infallible;

    fn trigger(&self) -> Result<(), Infallible> {
        self.0
            .report(ExitReason::GuestReset, "the guest reset itself");
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use vmm_sys_util::tempfile::TempFile;

    #[test]
    fn what_the_guest_prints_is_in_the_log() {
        let file = TempFile::new().unwrap();
        let mut port =
            SerialPort::new(ConsoleLog::create(file.as_path(), 1 << 16).unwrap()).unwrap();
        for byte in b"hello\n" {
            port.write(0, &[*byte]);
        }
        assert_eq!(std::fs::read(file.as_path()).unwrap(), b"hello\n");
        let mut line_status = [0];
        port.read(5, &mut line_status);
        assert_eq!(line_status[0] & 0x60, 0x60, "ready for more");
    }

    #[test]
    fn a_pulse_on_the_reset_line_is_a_guest_reset_and_nothing_else_is() {
        let exit = Arc::new(ExitSlot::new().unwrap());
        let mut controller = ResetController::new(exit.clone());
        controller.write(4, &[0xd1]);
        controller.write(0, &[0xfe]);
        assert_eq!(exit.get(), None);
        controller.write(4, &[0xfe]);
        assert_eq!(exit.get().unwrap().reason, ExitReason::GuestReset);
    }
}
