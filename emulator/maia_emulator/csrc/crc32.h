/* CRC-32 as in IEEE 802.3 and zlib; start with 0, feed the result back in to go on. */
#ifndef MAIA_CRC32_H
#define MAIA_CRC32_H

#include <stddef.h>
#include <stdint.h>

uint32_t maia_crc32(uint32_t crc, const unsigned char *data, size_t size);

#endif
