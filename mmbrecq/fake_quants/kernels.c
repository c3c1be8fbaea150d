/* The arithmetic of a training step on a CPU, each in one pass over memory; see native.py. */

#include <float.h>
#include <math.h>
#include <stdint.h>

#if defined(__GLIBC__) && defined(__x86_64__)
/* glibc has these for vectors, and its header says so to -ffast-math alone, which would change more than that. */
#pragma omp declare simd notinbranch
extern float expf(float);
#pragma omp declare simd notinbranch
extern float logf(float);
#endif

/* Below this many elements a second thread costs more than it gains. */
#define SERIAL 16384
/* Sums are of blocks of this size, whatever the number of threads: their last bit never changes. */
#define BLOCK 4096

/* sigma = clamp(sigmoid(alpha), low, high); weight = (base + stride * sigma) * gain, one gain for a row or for all. */
void soft_weight(int64_t rows, int64_t columns, const float *restrict alpha, const float *restrict base,
                 const float *restrict stride, const float *restrict gain, int64_t gain_step, float *restrict sigma,
                 float *restrict weight, float low, float high) {
#pragma omp parallel for schedule(static) if (rows * columns > SERIAL)
    for (int64_t row = 0; row < rows; row++) {
        const float factor = gain[row * gain_step];
#pragma omp simd
        for (int64_t i = row * columns; i < (row + 1) * columns; i++) {
            float s = 1.0f / (1.0f + expf(-alpha[i]));
            s = s < low ? low : s;
            s = s > high ? high : s;
            sigma[i] = s;
            weight[i] = (base[i] + stride[i] * s) * factor;
        }
    }
}

/* out: gradient of alpha, with the regulariser's; gain_grad: that of the gain, row by row. */
void rounding_gradient(int64_t rows, int64_t columns, const float *restrict grad, const float *restrict weight,
                       const float *restrict stride, const float *restrict sigma, const float *restrict gain,
                       int64_t gain_step, float *restrict out, float *restrict gain_grad, float low, float half,
                       float high, float power, float factor) {
#pragma omp parallel for schedule(static) if (rows * columns > SERIAL)
    for (int64_t row = 0; row < rows; row++) {
        const float stretch = gain[row * gain_step];
        const int64_t start = row * columns, end = start + columns;
        float sum = 0.0f;
        if (factor == 0.0f) {
#pragma omp simd reduction(+ : sum)
            for (int64_t i = start; i < end; i++) {
                const float s = sigma[i], g = grad[i] * stride[i] * stretch;
                sum += grad[i] * weight[i];
                out[i] = s > low && s < high ? g * s * (1.0f - s) : 0.0f;
            }
        } else {
#pragma omp simd reduction(+ : sum)
            for (int64_t i = start; i < end; i++) {
                const float s = sigma[i], centred = s - half;
                const float regulariser = centred * expf(power * logf(centred * centred + FLT_MIN));
                const float g = grad[i] * stride[i] * stretch + factor * regulariser;
                sum += grad[i] * weight[i];
                out[i] = s > low && s < high ? g * s * (1.0f - s) : 0.0f;
            }
        }
        gain_grad[row] = sum / stretch;
    }
}

/* out = clamp(round(x / scale), low, high) * scale; x itself where keep is there and 0. */
void fake_quantize(int64_t count, const float *restrict x, const float *restrict keep, float *restrict out, float scale,
                   float low, float high) {
#pragma omp parallel for simd schedule(static) if (count > SERIAL)
    for (int64_t i = 0; i < count; i++) {
        float code = rintf(x[i] / scale);
        code = code < low ? low : code;
        code = code > high ? high : code;
        out[i] = code * scale;
    }
    if (keep) {
#pragma omp parallel for simd schedule(static) if (count > SERIAL)
        for (int64_t i = 0; i < count; i++)
            out[i] = keep[i] != 0.0f ? out[i] : x[i];
    }
}

/* grad_x = grad where low < x < high, or keep is there and 0; returns <grad, out> - <grad_x, x>. */
double fake_quantize_gradient(int64_t count, const float *restrict grad, const float *restrict x,
                              const float *restrict out, const float *restrict keep, float *restrict grad_x,
                              double *restrict sums, float low, float high) {
    const int64_t blocks = (count + BLOCK - 1) / BLOCK;
#pragma omp parallel for schedule(static) if (count > SERIAL)
    for (int64_t block = 0; block < blocks; block++) {
        const int64_t start = block * BLOCK, end = start + BLOCK < count ? start + BLOCK : count;
        float sum = 0.0f;
        if (keep) {
#pragma omp simd reduction(+ : sum)
            for (int64_t i = start; i < end; i++) {
                const float g = (x[i] > low && x[i] < high) || keep[i] == 0.0f ? grad[i] : 0.0f;
                grad_x[i] = g;
                sum += grad[i] * out[i] - g * x[i];
            }
        } else {
#pragma omp simd reduction(+ : sum)
            for (int64_t i = start; i < end; i++) {
                const float g = x[i] > low && x[i] < high ? grad[i] : 0.0f;
                grad_x[i] = g;
                sum += grad[i] * out[i] - g * x[i];
            }
        }
        sums[block] = sum;
    }
    double total = 0.0;
    for (int64_t block = 0; block < blocks; block++)
        total += sums[block];
    return total;
}
