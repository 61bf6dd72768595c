// Copied from common/native/parallel.hpp by common/sync.py: change it there.
// Runs one operation's shares on a pool that belongs to somebody else: PyTorch's own, most often (two OpenMP
// runtimes in one process fight for the cores).
#pragma once
#include <cstdint>

namespace native {

using Operation = int32_t (*)(const void *args, int32_t ith, int32_t nth);
using ParallelFor = int32_t (*)(int64_t begin, int64_t end, int64_t grain, void (*)(int64_t, int64_t, void *), void *);

struct Job {
    Operation operation;
    const void *args;
    int32_t nth;
    int32_t error;
};

inline void shares(int64_t begin, int64_t end, void *context) {
    Job *job = static_cast<Job *>(context);
    for (int64_t i = begin; i < end; ++i) {
        const int32_t error = job->operation(job->args, int32_t(i), job->nth);
        if (error) job->error = error;
    }
}

// 0, an operation's error, or -1 if the pool failed. Without a pool, all shares run one after the other.
inline int32_t run_on(ParallelFor pool, Operation operation, const void *args, int32_t nth) {
    Job job{operation, args, nth, 0};
    if (!pool || nth == 1)
        shares(0, nth, &job);
    else if (pool(0, nth, 1, shares, &job))
        return -1;
    return job.error;
}

// Several operations, one after the other: what a decoding step does, in one call from Python.
struct Step {
    Operation operation;
    const void *args;
    int32_t nth, unused;
};

inline int32_t run_steps(ParallelFor pool, const Step *steps, int32_t count) {
    for (int32_t i = 0; i < count; ++i)
        if (const int32_t error = run_on(pool, steps[i].operation, steps[i].args, steps[i].nth)) return error;
    return 0;
}

}  // namespace native
