// The largest errors of elementary functions over runs of fp32 bit patterns, against the same function in fp64.

// NaN and infinity where the reference is finite count as infinitely wrong.
__device__ unsigned long long record(double error, unsigned x)
{
    float upper = error == error ? __double2float_ru(error) : __int_as_float(0x7f800000);
    return (unsigned long long)__float_as_uint(upper) << 32 | x;
}

// worst[0] takes the largest absolute error, worst[1] the largest relative one: the error's bits, then its x's.
#define SWEEP(name, ...)                                                                                            \
    extern "C" __global__ void name(unsigned first, unsigned count, unsigned long long *worst)                      \
    {                                                                                                               \
        unsigned long long absolute = 0, relative = 0;                                                              \
        unsigned long long stride = (unsigned long long)gridDim.x * blockDim.x;                                     \
        for (unsigned long long i = blockIdx.x * blockDim.x + threadIdx.x; i < count; i += stride) {                \
            unsigned bits = first + (unsigned)i;                                                                    \
            float x = __uint_as_float(bits);                                                                        \
            double error, size;                                                                                     \
            __VA_ARGS__;                                                                                            \
            absolute = max(absolute, record(error, bits));                                                          \
            relative = max(relative, record(error == 0 ? 0 : error / size, bits));                                  \
        }                                                                                                           \
        atomicMax(worst, absolute);                                                                                 \
        atomicMax(worst + 1, relative);                                                                             \
    }

#define INSTRUCTION(name, ptx, REFERENCE)                                                                           \
    SWEEP(name, {                                                                                                   \
        float y;                                                                                                    \
        asm(ptx " %0, %1;" : "=f"(y) : "f"(x));                                                                     \
        double exact = REFERENCE((double)x);                                                                        \
        error = fabs(y - exact);                                                                                    \
        size = fabs(exact);                                                                                         \
    })

__device__ double reciprocal(double x) { return 1 / x; }
__device__ double reciprocal_root(double x) { return 1 / sqrt(x); }

INSTRUCTION(ex2_approx, "ex2.approx.ftz.f32", exp2)
INSTRUCTION(tanh_approx, "tanh.approx.f32", tanh)
INSTRUCTION(sin_approx, "sin.approx.f32", sin)
INSTRUCTION(cos_approx, "cos.approx.f32", cos)
INSTRUCTION(rcp_approx, "rcp.approx.ftz.f32", reciprocal)
INSTRUCTION(rsqrt_approx, "rsqrt.approx.ftz.f32", reciprocal_root)
INSTRUCTION(lg2_approx, "lg2.approx.ftz.f32", log2)

// Of the two results the one that is farther off.
SWEEP(sincos_fast, {
    float s, c;
    double exact_s, exact_c;
    __sincosf(x, &s, &c);
    sincos((double)x, &exact_s, &exact_c);
    double error_s = fabs(s - exact_s), error_c = fabs(c - exact_c);
    // written so that a NaN is the larger one
    bool sine = !(error_s <= error_c);
    error = sine ? error_s : error_c;
    size = fabs(sine ? exact_s : exact_c);
})
