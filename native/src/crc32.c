#include "crc32.h"

#include <pthread.h>
#include <string.h>

/* Slicing by eight: eight independent look-ups per eight bytes instead of eight dependent ones. */
static uint32_t table[8][256];
static pthread_once_t once = PTHREAD_ONCE_INIT;

static void fill_table(void) {
    for (uint32_t i = 0; i < 256; i++) {
        uint32_t c = i;
        for (int bit = 0; bit < 8; bit++) c = (c >> 1) ^ (0xEDB88320u & (0u - (c & 1u)));
        table[0][i] = c;
    }
    for (uint32_t i = 0; i < 256; i++)
        for (int slice = 1; slice < 8; slice++)
            table[slice][i] = (table[slice - 1][i] >> 8) ^ table[0][table[slice - 1][i] & 0xFF];
}

uint32_t bapq_crc32(const uint8_t *data, size_t bytes) {
    pthread_once(&once, fill_table);
    uint32_t c = 0xFFFFFFFFu;
    for (; bytes >= 8; bytes -= 8, data += 8) {
        uint32_t low, high;
        memcpy(&low, data, 4); /* both targets are little-endian */
        memcpy(&high, data + 4, 4);
        low ^= c;
        c = table[7][low & 0xFF] ^ table[6][(low >> 8) & 0xFF] ^ table[5][(low >> 16) & 0xFF] ^
            table[4][low >> 24] ^ table[3][high & 0xFF] ^ table[2][(high >> 8) & 0xFF] ^
            table[1][(high >> 16) & 0xFF] ^ table[0][high >> 24];
    }
    for (; bytes > 0; bytes--) c = (c >> 8) ^ table[0][(c ^ *data++) & 0xFF];
    return ~c;
}
