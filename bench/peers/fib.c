/* The recursion, for a comparison of compilers. */
#include <stdio.h>
#include <stdlib.h>

static unsigned long fib(unsigned n) { return n < 2 ? n : fib(n - 1) + fib(n - 2); }

int main(int argc, char **argv) {
    printf("%lu\n", argc == 2 ? fib(atoi(argv[1])) : 0);
    return 0;
}
