#include "prepare.h"

void cvxq_prepare_portable(const cvxq_matrix *w, const cvxq_cluster *cluster, int64_t groups,
                           const float *x, const uint8_t *soon, cvxq_input *out) {
    prepare_input(w, cluster, groups, x, soon, out);
}
