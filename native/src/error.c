/* Filling a bapq_error. */
#include "error.h"

#include <stdarg.h>
#include <stdio.h>

int32_t bapq_fail(bapq_error *error, bapq_status status, const char *format, ...) {
    va_list arguments;
    error->status = status;
    error->os_errno = 0;
    error->layer = -1;
    error->chunk = -1;
    va_start(arguments, format);
    vsnprintf(error->message, sizeof error->message, format, arguments);
    va_end(arguments);
    return status;
}
