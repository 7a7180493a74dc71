"""vfio-user messages written by hand from the specification's text, byte by byte.

They are not made by ``maia_rt.transport.wire``: client and server share that file and could agree on the same mistake.
Each message stands as the bytes on the socket, one field a line, little endian.
"""

# Header: id u16, command u16, size u32, flags u32, errno u32.


def message(text: str) -> bytes:
    """Turn hexadecimal lines with comments after ``|`` into bytes."""
    return b"".join(bytes.fromhex(line.split("|")[0]) for line in text.splitlines())


DMA_MAP_REQUEST = message("""
    34 12        | id 0x1234
    02 00        | command 2
    30 00 00 00  | size 48 = 16 + 32
    00 00 00 00  | flags: a command
    00 00 00 00  | errno
    20 00 00 00  | argsz 32
    03 00 00 00  | flags: readable, writable
    00 10 00 00 00 00 00 00  | offset 0x1000 in the descriptor
    00 00 00 10 00 00 00 00  | address 0x10000000
    00 00 20 00 00 00 00 00  | size 0x200000
""")
DMA_MAP_FIELDS = (32, 3, 0x1000, 0x1000_0000, 0x20_0000)

DMA_UNMAP_REQUEST = message("""
    34 12  03 00  28 00 00 00  00 00 00 00  00 00 00 00  | command 3, size 40 = 16 + 24
    18 00 00 00  | argsz 24
    00 00 00 00  | flags
    00 00 00 10 00 00 00 00  | address
    00 00 20 00 00 00 00 00  | size
""")
DMA_UNMAP_FIELDS = (24, 0, 0x1000_0000, 0x20_0000)

DEVICE_INFO_REPLY = message("""
    34 12  04 00  20 00 00 00  01 00 00 00  00 00 00 00  | command 4, size 32, flags: a reply
    10 00 00 00  | argsz 16
    03 00 00 00  | flags: reset, PCI
    09 00 00 00  | regions
    05 00 00 00  | interrupt indexes
""")
DEVICE_INFO_FIELDS = (16, 3, 9, 5)

REGION_INFO_REPLY = message("""
    34 12  05 00  58 00 00 00  01 00 00 00  00 00 00 00  | command 5, size 88 = 16 + 72, a reply
    48 00 00 00  | argsz 72 = 32 + 8 + 8 + 16 + 8 spare; see below
    0f 00 00 00  | flags: read, write, mmap, capabilities
    02 00 00 00  | index 2
    20 00 00 00  | first capability at 32
    00 00 01 00 00 00 00 00  | size 0x10000
    00 00 00 40 00 00 00 00  | offset 0x40000000 in the descriptor
    02 00  01 00  30 00 00 00  | capability 2 (type), version 1, next at 48
    05 00 00 00  | type 5
    07 00 00 00  | subtype 7
    01 00  01 00  00 00 00 00  | capability 1 (sparse mmap), version 1, the last
    00 00 00 00  | no areas
    00 00 00 00  | reserved
    ff ff ff ff ff ff ff ff  | spare, nobody looks at it
""")
REGION_INFO_FIELDS = (72, 0xF, 2, 32, 0x1_0000, 0x4000_0000)

REGION_SPARSE_REPLY = message("""
    34 12  05 00  60 00 00 00  01 00 00 00  00 00 00 00  | size 96 = 16 + 80
    50 00 00 00  | argsz 80 = 32 + 8 + 8 + 2 * 16
    0f 00 00 00  | flags: read, write, mmap, capabilities
    02 00 00 00  | index 2
    20 00 00 00  | first capability at 32
    00 00 01 00 00 00 00 00  | size 0x10000
    00 00 00 40 00 00 00 00  | offset 0x40000000
    01 00  01 00  00 00 00 00  | capability 1 (sparse mmap), version 1, the last
    02 00 00 00  | two areas
    00 00 00 00  | reserved
    00 10 00 00 00 00 00 00  | 0x1000
    00 20 00 00 00 00 00 00  | 0x2000 bytes
    00 80 00 00 00 00 00 00  | 0x8000
    00 10 00 00 00 00 00 00  | 0x1000 bytes
""")
REGION_SPARSE_AREAS = [(0x1000, 0x2000), (0x8000, 0x1000)]

REGION_TOO_SMALL_REPLY = message("""
    34 12  05 00  30 00 00 00  01 00 00 00  00 00 00 00  | size 48 = 16 + 32
    50 00 00 00  | argsz 80: ask again with so much
    07 00 00 00  | flags: read, write, mmap, not capabilities
    02 00 00 00  | index 2
    00 00 00 00  | no capability
    00 00 01 00 00 00 00 00
    00 00 00 40 00 00 00 00
""")

IRQ_INFO_REPLY = message("""
    34 12  07 00  20 00 00 00  01 00 00 00  00 00 00 00  | command 7
    10 00 00 00  | argsz 16
    09 00 00 00  | flags: eventfd, no resize
    02 00 00 00  | index 2: MSI-X
    41 00 00 00  | 65 vectors
""")
IRQ_INFO_FIELDS = (16, 9, 2, 65)

SET_IRQS_REQUEST = message("""
    34 12  08 00  24 00 00 00  00 00 00 00  00 00 00 00  | command 8, size 36 = 16 + 20
    14 00 00 00  | argsz 20
    24 00 00 00  | flags: data eventfd (4), action trigger (32)
    02 00 00 00  | index 2: MSI-X
    01 00 00 00  | start
    03 00 00 00  | count
""")
SET_IRQS_FIELDS = (20, 0x24, 2, 1, 3)

REGION_READ_REQUEST = message("""
    34 12  09 00  20 00 00 00  00 00 00 00  00 00 00 00  | command 9, size 32 = 16 + 16
    40 00 00 00 00 00 00 00  | offset 0x40
    07 00 00 00  | region 7: configuration space
    04 00 00 00  | count
""")
REGION_READ_REPLY = message("""
    34 12  09 00  24 00 00 00  01 00 00 00  00 00 00 00  | size 36 = 16 + 16 + 4, a reply
    40 00 00 00 00 00 00 00
    07 00 00 00
    04 00 00 00
    78 56 34 12  | the data
""")
REGION_WRITE_REQUEST = message("""
    34 12  0a 00  24 00 00 00  00 00 00 00  00 00 00 00  | command 10, size 36
    40 00 00 00 00 00 00 00
    07 00 00 00
    04 00 00 00
    78 56 34 12
""")
REGION_WRITE_POSTED = message("""
    34 12  0a 00  24 00 00 00  10 00 00 00  00 00 00 00  | flags: a command, no reply wanted (bit 4)
    40 00 00 00 00 00 00 00
    07 00 00 00
    04 00 00 00
    78 56 34 12
""")
REGION_WRITE_REPLY = message("""
    34 12  0a 00  20 00 00 00  01 00 00 00  00 00 00 00  | size 32 = 16 + 16
    40 00 00 00 00 00 00 00
    07 00 00 00
    04 00 00 00
""")
REGION_ACCESS_FIELDS = (0x40, 7, 4)

WRITE_MULTI_REQUEST = message("""
    34 12  0f 00  48 00 00 00  10 00 00 00  00 00 00 00  | command 15, size 72 = 16 + 8 + 2 * 24, no reply
    02 00 00 00 00 00 00 00  | two writes
    10 00 00 00 00 00 00 00  00 00 00 00  04 00 00 00  78 56 34 12 00 00 00 00  | 4 bytes at 0x10 of region 0
    18 00 00 00 00 00 00 00  02 00 00 00  01 00 00 00  ff 00 00 00 00 00 00 00  | 1 byte at 0x18 of region 2
""")
WRITE_MULTI_FIELDS = [(0x10, 0, 4, b"\x78\x56\x34\x12\0\0\0\0"), (0x18, 2, 1, b"\xff\0\0\0\0\0\0\0")]

DMA_READ_REQUEST = message("""
    77 00  0b 00  20 00 00 00  00 00 00 00  00 00 00 00  | command 11, size 32
    08 00 00 10 00 00 00 00  | address 0x10000008
    05 00 00 00 00 00 00 00  | count, 64 bits
""")
DMA_READ_REPLY = message("""
    77 00  0b 00  25 00 00 00  01 00 00 00  00 00 00 00  | size 37 = 16 + 16 + 5
    08 00 00 10 00 00 00 00
    05 00 00 00 00 00 00 00
    68 65 6c 6c 6f  | "hello"
""")
DMA_WRITE_REQUEST = message("""
    78 00  0c 00  25 00 00 00  00 00 00 00  00 00 00 00  | command 12
    08 00 00 10 00 00 00 00
    05 00 00 00 00 00 00 00
    77 6f 72 6c 64  | "world"
""")
DMA_WRITE_REPLY = message("""
    78 00  0c 00  20 00 00 00  01 00 00 00  00 00 00 00  | size 32: address and a 64-bit count
    08 00 00 10 00 00 00 00
    05 00 00 00 00 00 00 00
""")

ERROR_REPLY = message("""
    34 12  09 00  10 00 00 00  21 00 00 00  16 00 00 00  | header only, flags: a reply (1), error (bit 5); errno 22
""")
RESET_REQUEST = message("34 12  0d 00  10 00 00 00  00 00 00 00  00 00 00 00")
RESET_REPLY = message("34 12  0d 00  10 00 00 00  01 00 00 00  00 00 00 00")

VERSION_TEXT = b'{"capabilities":{"max_msg_fds":8,"max_data_xfer_size":65536}}\0'
VERSION_REQUEST = message("""
    34 12  01 00  52 00 00 00  00 00 00 00  00 00 00 00  | command 1, size 82 = 16 + 4 + 62
    00 00  01 00  | major 0, minor 1
""") + VERSION_TEXT


def with_id(raw: bytes, number: int) -> bytes:
    """Return `raw` with another message id: the sender chooses it."""
    return number.to_bytes(2, "little") + raw[2:]
