"""Layouts of the extended capabilities. Sources: PCI Express Base 6.0, 7.7, 7.8, 7.9, 9.3, 10.5."""

from __future__ import annotations

from typing import Final

HEADER: Final = """
0x00 4 header              Extended capability header
  15:0  ro id                  Id
  19:16 ro version             Version
  31:20 ro next                Offset of the next one, 0 in the last
"""

_UNCORRECTABLE = (
    (4, "data_link", "Data link protocol error"), (5, "surprise_down", "The link went down by surprise"),
    (12, "poisoned", "Poisoned data was received"), (13, "flow_control", "Flow control protocol error"),
    (14, "completion_timeout", "A completion did not come in time"),
    (15, "completer_abort", "A request was completed as completer abort"),
    (16, "unexpected_completion", "A completion nobody asked for"),
    (17, "receiver_overflow", "More data than credits"), (18, "malformed", "A malformed packet"),
    (19, "ecrc", "End-to-end CRC error"), (20, "unsupported", "An unsupported request"),
    (21, "acs_violation", "Access control services violation"), (22, "internal", "Internal error"),
    (23, "multicast_blocked", "A multicast packet was blocked"),
    (24, "atomic_blocked", "An atomic operation was blocked"),
    (25, "prefix_blocked", "A TLP prefix was blocked"), (26, "poisoned_blocked", "A poisoned packet was blocked"),
)
_SEVERE = {4, 5, 13, 17, 18, 22}
"""Uncorrectable errors that are fatal after reset (7.8.4.4)."""
_CORRECTABLE = (
    (0, "receiver", "Receiver error"), (6, "bad_packet", "Bad TLP"), (7, "bad_dllp", "Bad DLLP"),
    (8, "replay_rollover", "The replay number rolled over"), (12, "replay_timeout", "The replay timer ran out"),
    (13, "advisory_nonfatal", "A non-fatal error, reported as advisory"), (14, "internal", "Corrected internal error"),
    (15, "header_overflow", "The header log overflowed"),
)


def _bits(rows: tuple[tuple[int, str, str], ...], access: str, reset: dict[int, int]) -> str:
    return "\n".join(f"  {bit} {access} {name}={reset.get(bit, 0)} {text}" for bit, name, text in rows)


AER: Final = f"""
0x04 4 uncorrectable_status   Uncorrectable errors since the bit was cleared
{_bits(_UNCORRECTABLE, 'w1c', {})}
0x08 4 uncorrectable_mask   Uncorrectable errors that are not reported
{_bits(_UNCORRECTABLE, 'rw', {22: 1})}
0x0c 4 uncorrectable_severity   Uncorrectable errors that are fatal
{_bits(_UNCORRECTABLE, 'rw', dict.fromkeys(_SEVERE, 1))}
0x10 4 correctable_status   Correctable errors since the bit was cleared
{_bits(_CORRECTABLE, 'w1c', {})}
0x14 4 correctable_mask    Correctable errors that are not reported
{_bits(_CORRECTABLE, 'rw', {13: 1, 14: 1, 15: 1})}
0x18 4 control             Control
  4:0   ro first_error         Bit of the first uncorrectable error
  5     ro ecrc_generation_capable   Can generate end-to-end CRCs
  6     rw ecrc_generation=0   Generates them
  7     ro ecrc_check_capable   Can check end-to-end CRCs
  8     rw ecrc_check=0        Checks them
  9     ro multiple_headers_capable   Can log several headers
  10    rw multiple_headers=0   Logs them
0x1c 4 header_log0         First word of the header of the packet with the first error
0x20 4 header_log1         Second word
0x24 4 header_log2         Third word
0x28 4 header_log3         Fourth word
"""

SERIAL: Final = """
0x04 8 number              Serial number, an EUI-64
"""

VENDOR: Final = """
0x04 4 vendor_header       Vendor specific header
  15:0  ro id                  Vendor's id of the structure
  19:16 ro revision            Revision
  31:20 ro length              Bytes, all of the capability's
"""

DVSEC: Final = """
0x04 4 vendor_header       Designated vendor header
  15:0  ro vendor_id           Whose structure it is
  19:16 ro revision            Revision
  31:20 ro length              Bytes, all of the capability's
0x08 2 dvsec_id            The vendor's id of the structure
"""

_ACS = (
    (0, "source_validation"), (1, "translation_blocking"), (2, "request_redirect"), (3, "completion_redirect"),
    (4, "upstream_forwarding"), (5, "egress_control"), (6, "direct_translated"),
)
_ACS_TEXT = {0: "Checks requester ids", 1: "Blocks translated requests", 2: "Sends peer requests up to the root",
             3: "Sends peer completions up to the root", 4: "Sends packets up again that are for itself",
             5: "Egress control vector", 6: "Lets translated requests go to peers"}
ACS: Final = f"""
0x04 2 capabilities        Access control services that exist
{chr(10).join(f'  {bit} ro {name} {_ACS_TEXT[bit]}' for bit, name in _ACS)}
  15:8 ro egress_size Bits of the egress control vector
0x06 2 control             Access control services that are on
{chr(10).join(f'  {bit} rw {name}=0 {_ACS_TEXT[bit]}' for bit, name in _ACS)}
"""

ARI: Final = """
0x04 2 capabilities        Alternative routing id
  0     ro mfvc_groups         Function groups for arbitration
  1     ro acs_groups          Function groups for access control
  15:8  ro next_function       Next function, 0 in the last
0x06 2 control             Control
  0     rw mfvc_groups=0       Arbitration groups are on
  1     rw acs_groups=0        Access control groups are on
  6:4   rw group=0             Group of the function
"""

ATS: Final = """
0x04 2 capabilities        Address translation services
  4:0   ro queue_depth         Invalidations taken at one time, 0 is 32
  5     ro page_aligned        Untranslated addresses are page aligned
  6     ro global_invalidate   Takes global invalidations
  7     ro relaxed_ordering    Translation requests may be relaxed
0x06 2 control             Control
  4:0   rw smallest_unit=0     Smallest translation, 4096 times a power of two
  15    rw enable=0            May cache translations
"""

PRI: Final = """
0x04 2 control             Page requests
  0     rw enable=0            May ask for pages
  1     pulse reset            Resets the interface
0x06 2 status              Status
  0     w1c response_failure   A page request failed
  1     w1c unexpected_group   A response nobody asked for
  8     ro stopped             No request is under way
  15    ro prefix_required     Responses need the PASID
0x08 4 capacity            Outstanding page requests it can have
0x0c 4 allocation          Outstanding page requests it may have
  31:0  rw requests=0          Count
"""

PASID: Final = """
0x04 2 capabilities        Process address space ids
  1     ro execute             Asks for execute permission
  2     ro privileged          Privileged mode
  12:8  ro width               Bits of an id
0x06 2 control             Control
  0     rw enable=0            May send ids
  1     rw execute=0           May ask for execute permission
  2     rw privileged=0        May use privileged mode
"""

SRIOV: Final = """
0x04 4 capabilities        Virtual functions
  0     ro migration           VF migration
  1     ro ari_preserved       Keeps the ARI hierarchy
  31:21 ro migration_message   Vector of migration
0x08 2 control             Control
  0     rw vf_enable=0         Virtual functions exist
  1     rw migration=0         Migration is on
  2     rw migration_interrupt=0   Migration interrupts
  3     rw vf_memory=0         Virtual functions answer memory accesses
  4     rw ari_hierarchy=0     Uses ARI numbers
0x0a 2 status              Status
  0     w1c migration          A migration event
0x0c 2 initial_vfs         Virtual functions at first
0x0e 2 total_vfs           Virtual functions at most
0x10 2 num_vfs             Virtual functions in use
  15:0  rw count=0             Count
0x12 1 dependency          Function that this one depends on
0x14 2 first_vf_offset     Routing id of the first virtual function, from this one
0x16 2 vf_stride           Distance of routing ids
0x1a 2 vf_device_id        Device id of the virtual functions
0x1c 4 page_sizes          Page sizes that can be set, a bit each, from 4096 on
0x20 4 page_size           Page size
  31:0  rw size=1              A bit, from 4096 on
"""

LTR: Final = """
0x04 2 max_snoop           Latency tolerance, snooped
  9:0   rw value=0             Value
  12:10 rw scale=0             Unit {0: 1 ns, 1: 32 ns, 2: 1024 ns, 3: 32768 ns}
0x06 2 max_no_snoop        Latency tolerance, not snooped
  9:0   rw value=0             Value
  12:10 rw scale=0             Unit {0: 1 ns, 1: 32 ns, 2: 1024 ns, 3: 32768 ns}
"""

SECONDARY_PCIE: Final = """
0x04 4 link_control3       Link control 3
  0     rw equalize            Starts equalization; in downstream ports
  1     rw equalize_interrupt   Interrupts when equalization is asked for
0x08 4 lane_errors         Lanes with errors since the bit was cleared
  31:0  w1c lanes=0            A bit a lane
"""

L1_SUBSTATES: Final = """
0x04 4 capabilities        L1 substates
  0     ro pcipm_l12           L1.2 by power management
  1     ro pcipm_l11           L1.1 by power management
  2     ro aspm_l12            L1.2 by ASPM
  3     ro aspm_l11            L1.1 by ASPM
  4     ro l1ss                Supports substates
0x08 4 control1            Control
  0     rw pcipm_l12           L1.2 by power management is on
  1     rw pcipm_l11           L1.1 by power management is on
  2     rw aspm_l12            L1.2 by ASPM is on
  3     rw aspm_l11            L1.1 by ASPM is on
"""

PTM: Final = """
0x04 4 capabilities        Precision time measurement
  0     ro requester           Asks for time
  1     ro responder           Answers
  2     ro root                Is the root of time
  15:8  ro granularity         Of its clock, in ns
0x08 4 control             Control
  0     rw enable=0            On
  1     rw root_select=0       Is the root of time
  15:8  rw granularity=0       Effective granularity, in ns
"""

RESIZABLE_BAR: Final = """
0x04 4 capabilities        Sizes of the first resizable BAR
  31:4  ro sizes               A bit each, from 1 MiB on
0x08 4 control             Control
  2:0   ro bar                 BAR
  7:5   ro count               Resizable BARs
  13:8  rw size                1 MiB times a power of two
"""

LAYOUTS: Final = {
    0x0001: ("aer", AER), 0x0003: ("serial", SERIAL), 0x000B: ("vendor_ext", VENDOR), 0x000D: ("acs", ACS),
    0x000E: ("ari", ARI), 0x000F: ("ats", ATS), 0x0010: ("sriov", SRIOV), 0x0013: ("pri", PRI),
    0x0015: ("resizable_bar", RESIZABLE_BAR), 0x0018: ("ltr", LTR), 0x0019: ("secondary_pcie", SECONDARY_PCIE),
    0x001B: ("pasid", PASID), 0x001E: ("l1_substates", L1_SUBSTATES), 0x001F: ("ptm", PTM), 0x0023: ("dvsec", DVSEC),
}
"""Extended capability id: the name of its registers, and their layout."""

NAMES: Final = {
    0x0002: "vc", 0x0004: "power_budget", 0x0005: "root_link", 0x0008: "mfvc", 0x0012: "multicast", 0x0016: "dpa",
    0x0017: "tph", 0x001D: "dpc", 0x0021: "frs", 0x0022: "rtr", 0x0025: "data_link", 0x0026: "physical_16",
    0x0027: "lane_margining", 0x002A: "physical_32", 0x002B: "alternate_protocol", 0x002E: "doe",
}
"""Extended capabilities of which only the header is shown by name."""
