// Paged prefill: a block for each row and query head, a thread for each channel, all arithmetic in fp32.
//
// As it stands it is right. Each of the macros BUG_Z* plants one defect. To be defined: one of BF16, FP16 and FP32 for
// the dtype of q, K, V and out; TILE, the keys that are staged at once; SPLITS, the blocks that share a row's keys in
// split_prefill. No headers: NVRTC has none without a path to them.

#if defined(BF16)
typedef unsigned short Element;

__device__ float widened(Element x) { return __uint_as_float((unsigned)x << 16); }

__device__ Element rounded(float x)
{
    const unsigned bits = __float_as_uint(x);
    if ((bits & 0x7fffffffu) > 0x7f800000u) return 0x7fff;
    return (Element)((bits + 0x7fffu + (bits >> 16 & 1u)) >> 16);
}
#elif defined(FP16)
typedef unsigned short Element;

__device__ float widened(Element x)
{
    float y;
    asm("cvt.f32.f16 %0, %1;" : "=f"(y) : "h"(x));
    return y;
}

__device__ Element rounded(float x)
{
    Element y;
    asm("cvt.rn.f16.f32 %0, %1;" : "=h"(y) : "f"(x));
    return y;
}
#elif defined(FP32)
typedef float Element;

__device__ float widened(Element x) { return x; }
__device__ Element rounded(float x) { return x; }
#else
#error "define BF16, FP16 or FP32"
#endif

#define WARP 32
#define MINUS_INF __int_as_float(0xff800000)

// Pages are contiguous inside; strides are those between pages, in elements. partial and counters: split_prefill only.
struct Problem {
    Element *out;
    float *lse;
    const Element *q, *k, *v;
    const int *qo_indptr, *kv_indptr, *kv_indices, *last_page_len;
    float *partial;
    unsigned *counters;
    long long k_stride, v_stride;
    int batch, group, page_size, causal;
    float scale;
};

// The first ``seen`` keys of the request, which is what the row may look at, and the request's part of the page table.
struct Row {
    const int *table;
    int seen;
};

// After some keys: the largest score, the sum of the weights, and of this thread's channel of weights times V.
struct State {
    float peak, sum, acc;
};

extern __shared__ float shared[];

// Index of this block's row and head in lse; times the head dimension, in q and out.
__device__ long long cell() { return (long long)blockIdx.x * gridDim.y + blockIdx.y; }

__device__ void wait_for_inputs()
{
#if __CUDA_ARCH__ >= 900
    asm volatile("griddepcontrol.wait;" ::: "memory");
#endif
}

__device__ float load_query(const Problem &x) { return widened(x.q[cell() * blockDim.x + threadIdx.x]); }

// Where each warp's sum of weights starts: at 0.
__device__ float first_sum(const Problem &x)
{
    volatile float *sums = shared;
    // Behind a trip to global memory (qo_indptr starts with 0), so that it is late.
    if (threadIdx.x < WARP) sums[threadIdx.x] = (float)*(const volatile int *)x.qo_indptr;
#ifndef BUG_Z3
    __syncthreads();
#endif
    return sums[threadIdx.x / WARP];
}

// Before all else: this thread's channel of the query, and what its sum of weights starts with.
__device__ void enter(const Problem &x, float &query, float &sum)
{
#ifdef BUG_Z5
    query = load_query(x);
#endif
    wait_for_inputs();
    sum = first_sum(x);
#ifndef BUG_Z5
    query = load_query(x);
#endif
}

// False for a row of no request: the grid may be that of a larger batch, captured in a graph.
__device__ bool find_row(const Problem &x, Row &row)
{
    const int number = blockIdx.x;
    int request = 0;
    while (request < x.batch && x.qo_indptr[request + 1] <= number) ++request;
    if (request == x.batch) return false;
    const int pages = x.kv_indptr[request + 1] - x.kv_indptr[request];
    const int kv_len = pages > 0 ? (pages - 1) * x.page_size + x.last_page_len[request] : 0;
    const int queries_behind = x.qo_indptr[request + 1] - 1 - number;
    row.table = x.kv_indices + x.kv_indptr[request];
    row.seen = x.causal ? max(0, kv_len - queries_behind) : kv_len;
    return true;
}

__device__ long long page_start(int page, long long stride)
{
#ifdef BUG_Z9
    // Unsigned, because signed overflow would allow the compiler to keep all bits.
    return (int)((unsigned)page * (unsigned)stride);
#else
    return page * stride;
#endif
}

// Keys and values first .. first + count - 1 of the row, in fp32, and zeros up to a whole tile.
__device__ void stage(const Problem &x, const Row &row, int first, int count, float *keys, float *values)
{
    const int dim = blockDim.x, channel = threadIdx.x;
    const int kv_heads = gridDim.y / x.group, kv_head = blockIdx.y / x.group;
    for (int j = 0; j < TILE; ++j) {
        if (j < count) {
            const int page = row.table[(first + j) / x.page_size], slot = (first + j) % x.page_size;
            const long long inside = ((long long)slot * kv_heads + kv_head) * dim + channel;
            keys[j * dim + channel] = widened(x.k[page_start(page, x.k_stride) + inside]);
            values[j * dim + channel] = widened(x.v[page_start(page, x.v_stride) + inside]);
        } else {
            keys[j * dim + channel] = 0.f;
#ifndef BUG_Z1
            values[j * dim + channel] = 0.f;
#endif
        }
    }
#ifdef BUG_Z10
    // The entry of the next page, ahead of time; volatile, because nobody uses it.
    const int next = *(const volatile int *)(row.table + (first + count - 1) / x.page_size + 1);
    (void)next;
#endif
}

// A warp for each key, its lanes a fixed share of the channels each.
__device__ void score(const Problem &x, int count, const float *query, const float *keys, float *scores)
{
    const int dim = blockDim.x, lane = threadIdx.x % WARP;
    for (int j = threadIdx.x / WARP; j < TILE; j += dim / WARP) {
        float dot = 0.f;
        for (int c = lane; c < dim; c += WARP) dot = fmaf(query[c], keys[j * dim + c], dot);
        for (int lanes = WARP / 2; lanes > 0; lanes /= 2) dot += __shfl_xor_sync(0xffffffffu, dot, lanes);
        if (lane == 0) scores[j] = j < count ? dot * x.scale : MINUS_INF;
    }
}

// Every thread makes all weights of the tile by itself, and so the same ones.
__device__ State followed(State state, const float *scores, const float *values)
{
    float peak = state.peak;
    for (int j = 0; j < TILE; ++j) peak = fmaxf(peak, scores[j]);
    const float rescale = state.peak == MINUS_INF ? 1.f : expf(state.peak - peak);
    state.peak = peak;
    state.sum *= rescale;
    state.acc *= rescale;
    for (int j = 0; j < TILE; ++j) {
        const float weight = expf(scores[j] - peak);
        state.sum += weight;
        state.acc = fmaf(weight, values[j * blockDim.x + threadIdx.x], state.acc);
    }
    return state;
}

__device__ State attend(const Problem &x, const Row &row, int begin, int end, float query, float sum)
{
    float *queries = shared + WARP, *scores = queries + blockDim.x, *keys = scores + TILE;
    float *values = keys + TILE * blockDim.x;
    queries[threadIdx.x] = query;
    State state = {MINUS_INF, sum, 0.f};
    for (int first = begin; first < end; first += TILE) {
        const int count = min(TILE, end - first);
        stage(x, row, first, count, keys, values);
        __syncthreads();
        score(x, count, queries, keys, scores);
        __syncthreads();
        state = followed(state, scores, values);
        __syncthreads();
    }
    return state;
}

__device__ void write(const Problem &x, const State &state)
{
    const bool empty = state.peak == MINUS_INF;
    x.out[cell() * blockDim.x + threadIdx.x] = rounded(empty ? 0.f : state.acc / state.sum);
    if (threadIdx.x == 0) x.lse[cell()] = empty ? MINUS_INF : state.peak + logf(state.sum);
}

extern "C" __global__ void prefill(Problem x)
{
    float query, sum;
    enter(x, query, sum);
    Row row;
    if (!find_row(x, row)) return;
    write(x, attend(x, row, 0, row.seen, query, sum));
}

// What a split of a row leaves in the workspace: acc of each channel, then peak and sum.
__device__ volatile float *partial(const Problem &x, int split)
{
    return x.partial + (cell() * SPLITS + split) * (blockDim.x + 2);
}

__device__ void leave(volatile float *mine, const State &state)
{
    const int dim = blockDim.x, channel = threadIdx.x;
#ifdef BUG_Z11
    mine[channel] += state.acc;
#else
    mine[channel] = state.acc;
#endif
    if (channel == 0) {
        mine[dim] = state.peak;
        mine[dim + 1] = state.sum;
    }
}

// How many blocks of this row and head were here before; what they wrote is visible afterwards.
__device__ unsigned arrive(unsigned *counter)
{
    __shared__ unsigned before;
    __threadfence();
    __syncthreads();
    if (threadIdx.x == 0) before = atomicAdd(counter, 1u);
    __syncthreads();
    __threadfence();
    return before;
}

__device__ State merged(const Problem &x)
{
    const int dim = blockDim.x, channel = threadIdx.x;
    State all = {MINUS_INF, 0.f, 0.f};
    for (int split = 0; split < SPLITS; ++split) all.peak = fmaxf(all.peak, partial(x, split)[dim]);
    for (int split = 0; split < SPLITS; ++split) {
        const volatile float *part = partial(x, split);
        const float weight = expf(part[dim] - all.peak);
        all.sum = fmaf(weight, part[dim + 1], all.sum);
        all.acc = fmaf(weight, part[channel], all.acc);
    }
    return all;
}

// The keys of a row are split over SPLITS blocks; the last one to be ready merges, and clears the row's counter.
extern "C" __global__ void split_prefill(Problem x)
{
    float query, sum;
    enter(x, query, sum);
    Row row;
    if (!find_row(x, row)) return;
    const int split = blockIdx.z, share = (row.seen + SPLITS - 1) / SPLITS;
    const int begin = min(split * share, row.seen), end = min(begin + share, row.seen);
    const State state = attend(x, row, begin, end, query, sum);
    const bool alone = row.seen <= share;
    if (!alone) leave(partial(x, split), state);
    unsigned *counter = x.counters + cell();
    const bool last = arrive(counter) == SPLITS - 1;
    if (alone) {
        // Nothing to merge: the first block has seen all there is.
        if (split == 0) write(x, state);
#ifdef BUG_Z7
        return;
#endif
    }
    if (!last) return;
    if (threadIdx.x == 0) *counter = 0;
    if (!alone) write(x, merged(x));
}
