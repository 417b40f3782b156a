/* Which instruction set is used: the best that processor and system have, or the one forced. */
#include "internal.h"

#if defined(__x86_64__)
static int has_avx2(void) {
    return __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma");
}
static int has_avx512(void) {
    return __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
           __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("avx512dq") &&
           __builtin_cpu_supports("avx512vbmi") && __builtin_cpu_supports("avx512vnni");
}
#endif

static const cvxq_ops *best(void) {
#if defined(__x86_64__)
    if (has_avx512()) return &cvxq_ops_avx512;
    if (has_avx2()) return &cvxq_ops_avx2;
#elif defined(__aarch64__)
    return &cvxq_ops_neon;
#endif
    return &cvxq_ops_scalar;
}

int cvxq_fetches_by_page(void) {
#if defined(__x86_64__)
    return !__builtin_cpu_is("amd");
#else
    return 1;
#endif
}

static const cvxq_ops *_Atomic in_use;

const cvxq_ops *cvxq_ops_in_use(void) {
    const cvxq_ops *ops = atomic_load_explicit(&in_use, memory_order_relaxed);
    if (!ops) {
        ops = best();
        atomic_store(&in_use, ops);
    }
    return ops;
}

const char *cvxq_isa(void) { return cvxq_ops_in_use()->name; }

int cvxq_force_isa(const char *name) {
    const cvxq_ops *wanted = NULL;
    if (!strcmp(name, "")) wanted = best();
    if (!strcmp(name, "scalar")) wanted = &cvxq_ops_scalar;
#if defined(__x86_64__)
    if (!strcmp(name, "avx2") && has_avx2()) wanted = &cvxq_ops_avx2;
    if (!strcmp(name, "avx512") && has_avx512()) wanted = &cvxq_ops_avx512;
#elif defined(__aarch64__)
    if (!strcmp(name, "neon")) wanted = &cvxq_ops_neon;
#endif
    if (wanted) atomic_store(&in_use, wanted);
    return wanted != NULL;
}
