/* CRC-32 (ISO-HDLC, reflected polynomial 0xEDB88320), the one of zlib and PNG. */
#ifndef BAPQ_CRC32_H
#define BAPQ_CRC32_H

#include <stddef.h>
#include <stdint.h>

uint32_t bapq_crc32(const uint8_t *data, size_t bytes);

#endif
