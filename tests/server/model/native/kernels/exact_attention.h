// Causal attention of one head and its gradients in doubles, and how far off the kernels' may be.
#pragma once
#include "check.h"

// One query over `length` keys and values: weights, and with them what a kernel's own may be off by, relatively.
struct ExactWeights {
    std::vector<double> p;
    double error;

    // key(i) leads to dim numbers.
    template <class Key>
    ExactWeights(const bf16* q, int dim, int length, Key key) : p(length) {
        const double scale = 1 / std::sqrt((double)dim);
        double most = -INFINITY, size = 0, sum = 0;
        for (int i = 0; i < length; i++) {
            double score = 0, magnitude = 0;
            for (int d = 0; d < dim; d++) {
                const double product = (double)to_float(q[d]) * to_float(key(i)[d]);
                score += product, magnitude += std::abs(product);
            }
            p[i] = score, most = std::max(most, score), size = std::max(size, magnitude);
        }
        for (double& of : p) sum += of = std::exp(scale * (of - most));
        for (double& of : p) of /= sum;
        // A score is a sum of dim products, of which another is taken away; what is wrong with an exponent is wrong
        // with its power. Then comes a sum of the powers, and a division by it.
        error = 2 * scale * (2 * sum_error(dim) * size + 3 * kU32 * 2 * size) + 2 * kExp + sum_error(length + 2);
    }
};
