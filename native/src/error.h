/* Filling a bapq_error. */
#ifndef BAPQ_ERROR_H
#define BAPQ_ERROR_H

#include "bapq.h"

/* Writes the error and returns its status. */
int32_t bapq_fail(bapq_error *error, bapq_status status, const char *format, ...)
    __attribute__((format(printf, 3, 4)));

#endif
