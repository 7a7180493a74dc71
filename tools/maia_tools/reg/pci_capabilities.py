"""Layouts of the standard capabilities. Sources: PCI Express Base 6.0, 7.5.2, 7.5.3, 7.7, 7.9; PCI PM 1.2, 3.2."""

from __future__ import annotations

from typing import Final

HEADER: Final = """
0x00 1 id                  Capability id
0x01 1 next                Offset of the next capability, 0 in the last
"""

PM: Final = """
0x02 2 capabilities        Power management capabilities
  2:0   ro version             Version
  3     ro pme_clock           0 in PCI Express
  4     ro immediate_ready     No wait after D3hot to D0
  5     ro device_specific     Needs initialization of its own after D0
  8:6   ro aux_current         Auxiliary power for PME from D3cold
  9     ro d1                  Supports D1
  10    ro d2                  Supports D2
  15:11 ro pme_support         States that PME is sent from, a bit a state: D0, D1, D2, D3hot, D3cold
0x04 2 control             Power management control and status
  1:0   rw state=0             Power state {0: D0, 1: D1, 2: D2, 3: D3hot}
  3     ro no_soft_reset       D3hot to D0 keeps the registers
  8     rw pme_enable=0        PME may be sent
  12:9  rw data_select         Which figure the data register shows
  14:13 ro data_scale          Unit of the data register
  15    w1c pme_status=0       PME was sent, or would have been
"""

MSI: Final = """
0x02 2 control             Message control
  0     rw enable=0            MSI is on; INTx is off
  3:1   ro capable             Vectors the function can use {0: 1, 1: 2, 2: 4, 3: 8, 4: 16, 5: 32}
  6:4   rw enabled=0           Vectors it may use {0: 1, 1: 2, 2: 4, 3: 8, 4: 16, 5: 32}
  7     ro address_64bit       Messages go to 64-bit addresses
  8     ro maskable            Vectors can be masked one by one
  9     ro extended_data       Has 32 bits of data
  10    rw extended_data_enable   Sends 32 bits of data
0x04 4 address             Message address
  31:2  rw address             @ Bits 31:2
"""
MSI_UPPER: Final = """
0x08 4 address_upper       Upper half of the message address
  31:0  rw address             Bits 63:32
"""
MSI_DATA: Final = """
0x{at:02x} 2 data                Message data
  15:0  rw data                The vector's number is added to its low bits
"""
MSI_MASK: Final = """
0x{mask:02x} 4 mask                Vectors held back
  31:0  rw vectors=0           A bit a vector
0x{pending:02x} 4 pending             Vectors that wait behind the mask
  31:0  ro vectors             A bit a vector
"""

MSIX: Final = """
0x02 2 control             Message control
  10:0  ro table_size          Vectors less one
  14    rw function_mask=0     Holds every vector back
  15    rw enable=0            MSI-X is on; INTx is off
0x04 4 table               Where the vector table is
  2:0   ro bar                 BAR
  31:3  ro offset              @ Bits 31:3 of the offset
0x08 4 pba                 Where the pending bits are
  2:0   ro bar                 BAR
  31:3  ro offset              @ Bits 31:3 of the offset
"""

VENDOR: Final = """
0x02 1 length              Bytes, all of the capability's
"""

SUBSYSTEM: Final = """
0x04 2 vendor_id           Who made the bridge's board
0x06 2 device_id           Which board it is
"""

AF: Final = """
0x02 1 length              Bytes
0x03 1 capabilities        Advanced features
  0     ro transactions_pending   Has the pending bit
  1     ro function_reset      Can be reset by this capability
0x04 1 control             Control
  0     pulse reset            Resets the function
0x05 1 status              Status
  0     ro transactions_pending   Requests are under way
"""

PCIE: Final = """
0x02 2 capabilities        PCI Express capabilities
  3:0   ro version             Version
  7:4   ro port_type           Kind of function {0: endpoint, 1: legacy endpoint, 4: root port, 5: upstream port,
                               6: downstream port, 7: PCIe to PCI bridge, 8: PCI to PCIe bridge,
                               9: integrated endpoint, 10: root complex event collector}
  8     ro slot                The port leads to a slot
  13:9  ro interrupt_message   Vector of the port's own interrupts
0x04 4 device_capabilities   What the function can do
  2:0   ro max_payload         Largest payload {0: 128 B, 1: 256 B, 2: 512 B, 3: 1024 B, 4: 2048 B, 5: 4096 B}
  4:3   ro phantom_functions   Function number bits usable in tags
  5     ro extended_tag        8-bit tags as requester
  8:6   ro l0s_latency         Acceptable L0s exit latency {0: 64 ns, 1: 128 ns, 2: 256 ns, 3: 512 ns, 4: 1 us,
                               5: 2 us, 6: 4 us, 7: no limit}
  11:9  ro l1_latency          Acceptable L1 exit latency {0: 1 us, 1: 2 us, 2: 4 us, 3: 8 us, 4: 16 us, 5: 32 us,
                               6: 64 us, 7: no limit}
  15    ro role_based_errors   Reports errors by role; 1 since PCIe 1.1
  25:18 ro slot_power          Power limit of the slot
  27:26 ro slot_power_scale    Its unit {0: 1 W, 1: 0.1 W, 2: 0.01 W, 3: 0.001 W}
  28    ro flr                 Function level reset exists
0x08 2 device_control      What the function may do
  0     rw correctable_report=0   Reports correctable errors
  1     rw nonfatal_report=0   Reports non-fatal errors
  2     rw fatal_report=0      Reports fatal errors
  3     rw unsupported_report=0   Reports unsupported requests
  4     rw relaxed_ordering=1   May set relaxed ordering
  7:5   rw max_payload=0       Payload limit {0: 128 B, 1: 256 B, 2: 512 B, 3: 1024 B, 4: 2048 B, 5: 4096 B}
  8     rw extended_tag        Uses 8-bit tags
  9     rw phantom_functions=0   Uses phantom functions
  10    rw aux_power=0         May draw auxiliary power
  11    rw no_snoop=1          May set no snoop
  14:12 rw max_read_request=2   Read request limit {0: 128 B, 1: 256 B, 2: 512 B, 3: 1024 B, 4: 2048 B, 5: 4096 B}
  15    pulse flr              Resets the function; in bridges another bit
0x0a 2 device_status       What happened
  0     w1c correctable=0      A correctable error
  1     w1c nonfatal=0         A non-fatal error
  2     w1c fatal=0            A fatal error
  3     w1c unsupported=0      An unsupported request was received
  4     ro aux_power           Auxiliary power is there
  5     ro transactions_pending   Requests are under way
"""

# Integrated endpoints have no link: these registers read as zero there.
PCIE_LINK: Final = """
0x0c 4 link_capabilities   What the link can do
  3:0   ro max_speed           Highest speed {1: 2.5 GT/s, 2: 5 GT/s, 3: 8 GT/s, 4: 16 GT/s, 5: 32 GT/s, 6: 64 GT/s}
  9:4   ro max_width           Lanes
  11:10 ro aspm                Link states {0: none, 1: L0s, 2: L1, 3: L0s and L1}
  14:12 ro l0s_exit            L0s exit latency
  17:15 ro l1_exit             L1 exit latency
  18    ro clock_pm            Takes part in clock power management
  19    ro surprise_down       Reports surprise down
  20    ro link_active         Reports link activity
  21    ro bandwidth_notify    Notifies of bandwidth changes
  22    ro aspm_optional       Complies with the ASPM optionality notice
  31:24 ro port                Port number
0x10 2 link_control        What the link may do
  1:0   rw aspm=0              Link states in use {0: none, 1: L0s, 2: L1, 3: L0s and L1}
  3     rw completion_boundary   Read completion boundary {0: 64 B, 1: 128 B}
  4     rw link_disable        Disables the link; in downstream ports
  5     rw retrain             Starts training; in downstream ports, reads as 0
  6     rw common_clock=0      Both ends share a reference clock
  7     rw extended_sync=0     Longer training, for test equipment
  8     rw clock_pm            May use CLKREQ#
  9     rw autonomous_width_disable   Keeps its width
0x12 2 link_status         How the link runs
  3:0   ro speed               Speed {1: 2.5 GT/s, 2: 5 GT/s, 3: 8 GT/s, 4: 16 GT/s, 5: 32 GT/s, 6: 64 GT/s}
  9:4   ro width               Lanes
  11    ro training            Training; in downstream ports
  12    ro slot_clock          Uses the connector's reference clock
  13    ro active              The link is active
  14    w1c bandwidth_managed   Bandwidth was changed by management
  15    w1c bandwidth_autonomous   Bandwidth was changed by hardware
"""

PCIE_SLOT: Final = """
0x14 4 slot_capabilities   What the slot can do
  0     ro attention_button    Has an attention button
  1     ro power_controller    Has a power controller
  4     ro power_indicator     Has a power indicator
  5     ro hot_plug_surprise   Devices may go without notice
  6     ro hot_plug            Hot plug
  31:19 ro number              Physical slot number
0x18 2 slot_control        What the slot does
  5     rw hot_plug_interrupt   Interrupts on hot plug events
  7:6   rw attention_indicator   Attention indicator {1: on, 2: blink, 3: off}
  9:8   rw power_indicator     Power indicator {1: on, 2: blink, 3: off}
  10    rw power_off           Turns the slot's power off
0x1a 2 slot_status         What happened at the slot
  0     w1c attention_pressed   The button was pressed
  1     w1c power_fault        A power fault
  3     w1c presence_changed   A card came or went
  4     w1c command_completed   The slot has done the last command
  6     ro presence            A card is there
  8     w1c link_changed       The link came up or went down
"""

PCIE_2: Final = """
0x24 4 device_capabilities2   What the function can do, continued
  3:0   ro timeout_ranges      Completion timeouts that can be set, a bit a range
  4     ro timeout_disable     The timeout can be turned off
  5     ro ari_forwarding      Forwards ARI; in ports
  6     ro atomic_routing      Routes atomic operations; in ports
  7     ro atomic_32           Completes 32-bit atomic operations
  8     ro atomic_64           Completes 64-bit atomic operations
  9     ro cas_128             Completes 128-bit compare and swap
  11    ro ltr                 Reports latency tolerance
  13:12 ro tph                 Completes TPH requests
  16    ro tag_10bit_completer   10-bit tags as completer
  17    ro tag_10bit_requester   10-bit tags as requester
  19:18 ro obff                Optimized buffer flush
  20    ro extended_fmt        Extended format field
  21    ro end_to_end_prefix   End-to-end TLP prefixes
0x28 2 device_control2     What the function may do, continued
  3:0   rw timeout_range=0     Completion timeout {0: 50 us to 50 ms, 1: 50 us to 100 us, 2: 1 ms to 10 ms,
                               5: 16 ms to 55 ms, 6: 65 ms to 210 ms, 9: 260 ms to 900 ms, 10: 1 s to 3.5 s,
                               13: 4 s to 13 s, 14: 17 s to 64 s}
  4     rw timeout_disable=0   No completion timeout
  5     rw ari_forwarding=0    Forwards ARI; in ports
  6     rw atomic_requester=0   May start atomic operations
  7     rw atomic_block=0      Blocks outgoing atomic operations; in ports
  8     rw ido_request=0       ID-based ordering of requests
  9     rw ido_completion=0    ID-based ordering of completions
  10    rw ltr=0               Reports latency tolerance
  12    rw tag_10bit=0         Uses 10-bit tags
  14:13 rw obff=0              Optimized buffer flush
0x2c 4 link_capabilities2   What the link can do, continued
  7:1   ro speeds              Speeds, a bit each: 2.5, 5, 8, 16, 32, 64 GT/s
  8     ro crosslink           Crosslink
0x30 2 link_control2       What the link may do, continued
  3:0   rw target_speed        Upper limit {1: 2.5 GT/s, 2: 5 GT/s, 3: 8 GT/s, 4: 16 GT/s, 5: 32 GT/s, 6: 64 GT/s}
  4     rw enter_compliance=0   Enters compliance mode
  5     rw autonomous_speed_disable   Keeps its speed
  6     ro deemphasis          Selectable de-emphasis
0x32 2 link_status2        How the link runs, continued
  0     ro deemphasis          De-emphasis {0: -6 dB, 1: -3.5 dB}
  1     ro equalized           Equalization has ended
  2     ro phase1              Phase 1 succeeded
  3     ro phase2              Phase 2 succeeded
  4     ro phase3              Phase 3 succeeded
  5     w1c equalization_request   The link asks for equalization
"""

LAYOUTS: Final = {
    0x01: ("pm", PM), 0x05: ("msi", MSI), 0x09: ("vendor", VENDOR), 0x0D: ("subsystem", SUBSYSTEM),
    0x10: ("pcie", PCIE), 0x11: ("msix", MSIX), 0x13: ("af", AF),
}
"""Capability id: the name of its registers, and their layout."""

NAMES: Final = {
    0x02: "agp", 0x03: "vpd", 0x04: "slot_id", 0x06: "hot_swap", 0x07: "pcix", 0x08: "hypertransport", 0x0A: "debug",
    0x0B: "cpci", 0x0C: "hot_plug", 0x0E: "agp8", 0x0F: "secure", 0x12: "sata", 0x14: "ea", 0x15: "fpb",
}
"""Capabilities of which only the first two bytes are shown by name."""
