//! ACPI tables for distribution kernels: CPUs, I/O APIC, serial port and virtio-mmio devices (ACPI 6.5).
//!
//! The platform is "hardware reduced" (4.1): no power management registers, no legacy timers to emulate.

use acpi_tables::aml::{Device, EISAName, IO, Interrupt, Memory32Fixed, Name, ResourceTemplate};
use acpi_tables::fadt::{FADTBuilder, Flags};
use acpi_tables::gas::{AccessSize, AddressSpace, GAS};
use acpi_tables::madt::{
    EnabledStatus, IoApic, LocalInterruptController, MADT, ProcessorLocalApic,
};
use acpi_tables::rsdp::Rsdp;
use acpi_tables::sdt::Sdt;
use acpi_tables::xsdt::XSDT;
use acpi_tables::{Aml, AmlSink};

use crate::layout;

const OEM_ID: [u8; 6] = *b"AIRLCK";
const OEM_TABLE_ID: [u8; 8] = *b"MICROVM ";
const OEM_REVISION: u32 = 1;
/// AML with 64-bit integers (19.6.29).
const DSDT_REVISION: u8 = 2;
const SDT_HEADER_BYTES: u32 = 36;
/// RSDP and every table start at a multiple of this.
const ALIGNMENT: usize = 64;
/// IAPC_BOOT_ARCH: no VGA to probe, no CMOS clock, and (bits 0 and 1 clear) no legacy devices and no 8042 (table 5.11).
const BOOT_ARCH: u16 = 1 << 2 | 1 << 5;
/// The byte which, written to the keyboard controller, resets a PC.
const RESET_VALUE: u8 = 0xfe;

/// All tables, as they lie at [`layout::ACPI_TABLES`], RSDP first.
pub fn build(cpus: u8, virtio_devices: usize) -> Vec<u8> {
    let mut tables = Tables {
        bytes: vec![0; ALIGNMENT],
    };
    let dsdt = tables.append(&dsdt(virtio_devices));
    let fadt = tables.append(&fadt(dsdt));
    let madt = tables.append(&madt(cpus));
    let mut xsdt = XSDT::new(OEM_ID, OEM_TABLE_ID, OEM_REVISION);
    xsdt.add_entry(fadt);
    xsdt.add_entry(madt);
    let xsdt = tables.append(&xsdt);
    let mut rsdp = Vec::new();
    Rsdp::new(OEM_ID, xsdt).to_aml_bytes(&mut rsdp);
    tables.bytes[..rsdp.len()].copy_from_slice(&rsdp);
    tables.bytes
}

struct Tables {
    bytes: Vec<u8>,
}

impl Tables {
    /// Appends a table and returns its guest-physical address.
    fn append(&mut self, table: &dyn Aml) -> u64 {
        self.bytes
            .resize(self.bytes.len().next_multiple_of(ALIGNMENT), 0);
        let address = layout::ACPI_TABLES + self.bytes.len() as u64;
        table.to_aml_bytes(&mut self.bytes);
        address
    }
}

fn fadt(dsdt: u64) -> impl Aml {
    let mut fadt = FADTBuilder::new(OEM_ID, OEM_TABLE_ID, OEM_REVISION)
        .dsdt_64(dsdt)
        .flag(Flags::Wbinvd)
        .flag(Flags::PwrButton)
        .flag(Flags::SlpButton)
        .flag(Flags::ResetRegSup)
        .flag(Flags::HwReducedAcpi);
    fadt.iapc_boot_arch = BOOT_ARCH.into();
    fadt.reset_reg = GAS::new(
        AddressSpace::SystemIo,
        8,
        0,
        AccessSize::ByteAccess,
        layout::I8042_COMMAND_PORT.into(),
    );
    fadt.reset_value = RESET_VALUE;
    fadt.finalize()
}

fn madt(cpus: u8) -> impl Aml {
    let controller = LocalInterruptController::Address(layout::LOCAL_APIC);
    let mut madt = MADT::new(OEM_ID, OEM_TABLE_ID, OEM_REVISION, controller);
    for id in 0..cpus {
        madt.add_structure(ProcessorLocalApic::new(id, id, EnabledStatus::Enabled));
    }
    madt.add_structure(IoApic::new(cpus, layout::IO_APIC, 0));
    madt
}

fn dsdt(virtio_devices: usize) -> Sdt {
    let mut aml = Vec::new();
    serial_port(&mut aml);
    for index in 0..virtio_devices {
        virtio_mmio(index, &mut aml);
    }
    let mut dsdt = Sdt::new(
        *b"DSDT",
        SDT_HEADER_BYTES,
        DSDT_REVISION,
        OEM_ID,
        OEM_TABLE_ID,
        OEM_REVISION,
    );
    dsdt.append_slice(&aml);
    dsdt
}

/// Edge-triggered and active high: each signal of an irqfd is one interrupt.
fn line(number: u32) -> Interrupt {
    Interrupt::new(true, true, false, false, number)
}

fn serial_port(aml: &mut dyn AmlSink) {
    let ports = IO::new(
        layout::SERIAL_PORT,
        layout::SERIAL_PORT,
        0,
        layout::SERIAL_PORTS as u8,
    );
    Device::new(
        "_SB_.COM1".into(),
        vec![
            &Name::new("_HID".into(), &EISAName::new("PNP0501")),
            &Name::new(
                "_CRS".into(),
                &ResourceTemplate::new(vec![&line(layout::SERIAL_IRQ), &ports]),
            ),
        ],
    )
    .to_aml_bytes(aml);
}

fn virtio_mmio(index: usize, aml: &mut dyn AmlSink) {
    // The layout keeps registers below 4 GiB, and the page's length is 4096.
    let registers = Memory32Fixed::new(
        true,
        layout::virtio_mmio(index) as u32,
        layout::VIRTIO_MMIO_BYTES as u32,
    );
    let name = format!("_SB_.VR{index:02}");
    Device::new(
        name.as_str().into(),
        vec![
            &Name::new("_HID".into(), &"LNRO0005"),
            &Name::new("_UID".into(), &index),
            &Name::new("_CCA".into(), &1usize),
            &Name::new(
                "_CRS".into(),
                &ResourceTemplate::new(vec![&registers, &line(layout::virtio_irq(index))]),
            ),
        ],
    )
    .to_aml_bytes(aml);
}
