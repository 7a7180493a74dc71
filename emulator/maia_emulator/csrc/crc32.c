#include "crc32.h"

#include <string.h>

static uint32_t crc_table[8][256];

__attribute__((constructor)) static void fill_crc_table(void) {
    for (uint32_t i = 0; i < 256; i++) {
        uint32_t x = i;
        for (int bit = 0; bit < 8; bit++) x = x >> 1 ^ (x & 1 ? 0xedb88320u : 0);
        crc_table[0][i] = x;
    }
    for (int t = 1; t < 8; t++)
        for (uint32_t i = 0; i < 256; i++) {
            uint32_t x = crc_table[t - 1][i];
            crc_table[t][i] = x >> 8 ^ crc_table[0][x & 255];
        }
}

uint32_t maia_crc32(uint32_t crc, const unsigned char *data, size_t size) {
    crc = ~crc;
    for (; size >= 8; size -= 8, data += 8) {
        uint64_t x;
        memcpy(&x, data, 8);
        x ^= crc;
        crc = 0;
        for (int i = 0; i < 8; i++) crc ^= crc_table[7 - i][x >> (8 * i) & 255];
    }
    while (size--) crc = crc >> 8 ^ crc_table[0][(crc ^ *data++) & 255];
    return ~crc;
}
