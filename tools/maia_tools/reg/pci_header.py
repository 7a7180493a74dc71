"""Layouts of the configuration header. Source: PCI Express Base 6.0, 7.5.1."""

from __future__ import annotations

from typing import Final

_COMMON: Final = """
0x00 2 vendor_id           Who made the function
0x02 2 device_id           Which function it is
0x04 2 command             What the function may do
  0     rw io_space=0          Answers accesses of its I/O BARs
  1     rw memory_space=0      Answers accesses of its memory BARs
  2     rw bus_master=0        May start requests: DMA and message interrupts
  3     ro special_cycles      Hard-wired 0 in PCI Express
  4     ro mem_write_inval     Memory write and invalidate; hard-wired 0 in PCI Express
  5     ro vga_palette_snoop   Hard-wired 0 in PCI Express
  6     rw parity_response=0   Reports poisoned data in the master data parity error bit
  8     rw serr_enable=0       Reports non-fatal and fatal errors
  9     ro fast_back_to_back   Hard-wired 0 in PCI Express
  10    rw intx_disable=0      May not assert INTx
0x06 2 status              What happened
  0     ro immediate_readiness   Ready for configuration accesses right after reset
  3     ro interrupt           INTx is pending inside the function
  4     ro capability_list=1   Capabilities start at the pointer at 0x34
  5     ro mhz66               66 MHz; 0 in PCI Express
  7     ro fast_back_to_back   0 in PCI Express
  8     w1c master_parity_error=0   A poisoned completion was received, or a poisoned request sent
  10:9  ro devsel              Timing; 0 in PCI Express
  11    w1c signaled_target_abort=0   The function completed a request as completer abort
  12    w1c received_target_abort=0   A request of the function was completed as completer abort
  13    w1c received_master_abort=0   A request of the function was completed as unsupported request
  14    w1c signaled_system_error=0   The function sent an error message
  15    w1c detected_parity_error=0   A poisoned request was received
0x08 4 class_revision      Class code and revision
  7:0   ro revision            Revision
  15:8  ro interface           Programming interface
  23:16 ro subclass            Subclass
  31:24 ro class               Base class {0: unclassified, 1: storage, 2: network, 3: display, 4: multimedia,
                               5: memory, 6: bridge, 7: communication, 8: system, 9: input, 0xc: serial bus,
                               0xd: wireless, 0x12: processing accelerator, 0xff: other}
0x0c 1 cache_line_size     Legacy; no effect in PCI Express
  7:0   rw size                In words of 4 bytes
0x0d 1 latency_timer       Legacy; 0 in PCI Express
0x0e 1 header_type         Layout of the header
  6:0   ro layout              Layout {0: endpoint, 1: bridge}
  7     ro multifunction       The device may have other functions
0x0f 1 bist                Built-in self test
  3:0   ro result              Completion code, 0 is good
  6     rw start               Starts the test; reads 1 while it runs
  7     ro capable             There is a test
"""

ENDPOINT: Final = _COMMON + """
0x28 4 cardbus_cis         Legacy CardBus pointer
0x2c 2 subsystem_vendor_id   Who made the board
0x2e 2 subsystem_id        Which board it is
0x30 4 rom                 Base address of the option ROM
  0     rw enable              The ROM answers; shares its decoder with the BARs
  31:11 rw address             @ Bits 31:11 of the bus address
0x34 1 capabilities        Offset of the first capability
0x3c 1 interrupt_line      Free for system software
  7:0   rw line                Routing; 0xff none
0x3d 1 interrupt_pin       Which INTx pin the function uses
  7:0   ro pin                 Pin {0: none, 1: INTA, 2: INTB, 3: INTC, 4: INTD}
0x3e 1 min_gnt             Legacy; 0 in PCI Express
0x3f 1 max_lat             Legacy; 0 in PCI Express
"""

BRIDGE: Final = _COMMON + """
0x18 1 primary_bus         Bus number above the bridge
  7:0   rw number              Bus
0x19 1 secondary_bus       Bus number right below the bridge
  7:0   rw number              Bus
0x1a 1 subordinate_bus     Highest bus number below the bridge
  7:0   rw number              Bus
0x1b 1 secondary_latency   Legacy; 0 in PCI Express
0x1c 1 io_base             Start of the I/O window
  3:0   ro width               Address width {0: 16 bits, 1: 32 bits}
  7:4   rw base                Address bits 15:12
0x1d 1 io_limit            End of the I/O window
  3:0   ro width               Address width {0: 16 bits, 1: 32 bits}
  7:4   rw limit               Address bits 15:12
0x1e 2 secondary_status    What happened on the bus below
  8     w1c master_parity_error   Poisoned data was seen
  11    w1c signaled_target_abort   Completer abort was sent
  12    w1c received_target_abort   Completer abort was received
  13    w1c received_master_abort   Unsupported request was received
  14    w1c received_system_error   An error message was received
  15    w1c detected_parity_error   A poisoned request was received
0x20 2 memory_base         Start of the memory window
  15:4  rw base                Address bits 31:20
0x22 2 memory_limit        End of the memory window
  15:4  rw limit               Address bits 31:20
0x24 2 prefetchable_base   Start of the prefetchable window
  3:0   ro width               Address width {0: 32 bits, 1: 64 bits}
  15:4  rw base                Address bits 31:20
0x26 2 prefetchable_limit   End of the prefetchable window
  3:0   ro width               Address width {0: 32 bits, 1: 64 bits}
  15:4  rw limit               Address bits 31:20
0x28 4 prefetchable_base_upper   Address bits 63:32
  31:0  rw base                Address bits 63:32
0x2c 4 prefetchable_limit_upper   Address bits 63:32
  31:0  rw limit               Address bits 63:32
0x30 2 io_base_upper       Address bits 31:16
  15:0  rw base                Address bits 31:16
0x32 2 io_limit_upper      Address bits 31:16
  15:0  rw limit               Address bits 31:16
0x34 1 capabilities        Offset of the first capability
0x38 4 rom                 Base address of the option ROM
  0     rw enable              The ROM answers
  31:11 rw address             @ Bits 31:11 of the bus address
0x3c 1 interrupt_line      Free for system software
  7:0   rw line                Routing; 0xff none
0x3d 1 interrupt_pin       Which INTx pin the function uses
  7:0   ro pin                 Pin {0: none, 1: INTA, 2: INTB, 3: INTC, 4: INTD}
0x3e 2 bridge_control      What the bridge may do
  0     rw parity_response     Reports poisoned data
  1     rw serr_enable         Forwards error messages
  2     rw isa_enable          Keeps ISA addresses out of the I/O window
  3     rw vga_enable          Forwards VGA accesses
  4     rw vga_16bit           Decodes 16 bits of VGA I/O addresses
  6     rw secondary_bus_reset   Holds the bus below in hot reset while 1
"""

MEMORY_BAR: Final = """
{offset:#04x} 4 bar{index}     Base address of BAR {index}
  0     ro io                  Kind {{0: memory, 1: I/O}}
  2:1   ro width               Address width {{0: 32 bits, 2: 64 bits}}
  3     ro prefetchable        Reads have no side effects
  31:4  rw address             @ Bits 31:4 of the bus address
"""

IO_BAR: Final = """
{offset:#04x} 4 bar{index}     Base address of BAR {index}
  0     ro io                  Kind {{0: memory, 1: I/O}}
  31:2  rw address             @ Bits 31:2 of the I/O address
"""

UPPER_BAR: Final = """
{offset:#04x} 4 bar{index}     Upper half of the BAR before it
  31:0  rw address             Bits 63:32 of the bus address
"""
