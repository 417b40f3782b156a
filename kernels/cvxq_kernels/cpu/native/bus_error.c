/* Ends the process in one line when a mapped file loses bytes while it is read.
 *
 * The system has no other answer to reading past the end of a mapped file than SIGBUS, at the very
 * instruction; neither Python nor the reader can go on from there.
 */
#include "cvxq.h"

#if defined(__unix__) || defined(__APPLE__)
#include <signal.h>
#include <string.h>
#include <unistd.h>

static char said[512];
static int code;

static void end(int number) {
    (void)number;
    const ssize_t written = write(STDERR_FILENO, said, strlen(said));
    (void)written;
    _exit(code);
}

int cvxq_catch_bus_errors(const char *line, int exit_code) {
    struct sigaction action;
    memset(&action, 0, sizeof action);
    action.sa_handler = end;
    strncpy(said, line, sizeof said - 1);
    code = exit_code;
    return sigaction(SIGBUS, &action, NULL) == 0;
}
#else
int cvxq_catch_bus_errors(const char *line, int exit_code) {
    (void)line;
    (void)exit_code;
    return 0;
}
#endif
