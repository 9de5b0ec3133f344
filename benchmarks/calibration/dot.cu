// A dot product of fp32 fused multiply-adds, one after the other: c[m, n] = sum over k of a[m, k] b[n, k].
extern "C" __global__ void fma_product(const float *a, const float *b, float *c, int rows, int cols, int k)
{
    int m = blockIdx.y, n = blockIdx.x * blockDim.x + threadIdx.x;
    if (m >= rows || n >= cols) return;
    a += (size_t)m * k;
    b += (size_t)n * k;
    float sum = 0;
    for (int i = 0; i < k; ++i) sum = __fmaf_rn(a[i], b[i], sum);
    c[(size_t)m * cols + n] = sum;
}
