// Threads that go through a list of records together, with a barrier after each, or that share out a list whose
// records do not depend on each other. Between lists they sleep.
#pragma once
#include "args.h"
#include <atomic>
#include <condition_variable>
#include <mutex>
#include <system_error>
#include <thread>
#include <vector>

#if defined(__x86_64__)
#include <immintrin.h>
#endif

namespace native {

inline void pause_briefly() {
#if defined(__x86_64__)
    _mm_pause();
#endif
}

class Pool {
  public:
    static Pool *make(int32_t threads) {
        try {
            return new Pool(threads);
        } catch (const std::system_error &) {
            return nullptr;
        }
    }

    ~Pool() {
        {
            std::lock_guard<std::mutex> lock(mutex_);
            stop_ = true;
            ++job_;
        }
        wake_.notify_all();
        for (std::thread &thread : threads_) thread.join();
    }

    // 0, or the first error; the records after it do not run.
    int32_t run(const cpmcu_record *records, int32_t count) { return start(records, count, false); }

    // Each record is one thread's, and nobody waits but at the end: other work may hold a core meanwhile. 0, or the
    // error of a record, whose index is then in `failed`; what has not begun does not run.
    int32_t share_out(const cpmcu_record *records, int32_t count, int32_t *failed) {
        const int32_t error = start(records, count, true);
        if (error) *failed = failed_;
        return error;
    }

  private:
    int32_t start(const cpmcu_record *records, int32_t count, bool independent) {
        std::lock_guard<std::mutex> one_at_a_time(running_);
        records_ = records, count_ = count, independent_ = independent;
        next_.store(0, std::memory_order_relaxed);
        error_.store(0, std::memory_order_relaxed);
        if (!threads_.empty()) {
            {
                std::lock_guard<std::mutex> lock(mutex_);
                ++job_;
            }
            wake_.notify_all();
        }
        work(0);
        return error_.load();
    }

    explicit Pool(int32_t threads) : size_(threads) {
        try {
            for (int32_t i = 1; i < threads; ++i) threads_.emplace_back([this, i] { serve(i); });
        } catch (...) {  // fewer than wanted: the destructor does not run
            {
                std::lock_guard<std::mutex> lock(mutex_);
                stop_ = true;
                ++job_;
            }
            wake_.notify_all();
            for (std::thread &thread : threads_) thread.join();
            throw;
        }
    }

    void serve(int32_t ith) {
        for (uint64_t seen = 0;;) {
            {
                std::unique_lock<std::mutex> lock(mutex_);
                wake_.wait(lock, [&] { return job_ != seen; });
                seen = job_;
                if (stop_) return;
            }
            work(ith);
        }
    }

    // All threads go through all records. Behind the last barrier the next list may already be there: what this one
    // is must have been read before.
    void work(int32_t ith) {
        const cpmcu_record *records = records_;
        if (independent_) {
            const int32_t count = count_;
            for (int32_t i; !error_.load(std::memory_order_relaxed) && (i = next_.fetch_add(1, std::memory_order_relaxed)) < count;) {
                int32_t none = 0;
                if (const int32_t error = records[i].operation(records[i].args, 0, 1))
                    if (error_.compare_exchange_strong(none, error)) failed_ = i;
            }
            meet();
            return;
        }
        for (int32_t i = 0, count = count_; i < count; ++i) {
            if (!error_.load(std::memory_order_relaxed))
                if (const int32_t error = records[i].operation(records[i].args, ith, size_)) error_.store(error);
            meet();
        }
    }

    // Everybody waits for everybody. Those who wait spin for some microseconds, then let others have the processor:
    // there may be more threads than cores.
    void meet() {
        if (size_ == 1) return;
        const uint32_t round = round_.load(std::memory_order_relaxed);
        if (arrived_.fetch_add(1, std::memory_order_acq_rel) == size_ - 1) {
            arrived_.store(0, std::memory_order_relaxed);
            round_.store(round + 1, std::memory_order_release);
            return;
        }
        for (int spins = 0; round_.load(std::memory_order_acquire) == round; ++spins)
            spins < 4000 ? pause_briefly() : std::this_thread::yield();
    }

    const int32_t size_;
    std::vector<std::thread> threads_;
    std::mutex running_, mutex_;
    std::condition_variable wake_;
    uint64_t job_ = 0;
    bool stop_ = false;
    const cpmcu_record *records_ = nullptr;
    int32_t count_ = 0, failed_ = 0;
    bool independent_ = false;
    alignas(64) std::atomic<int32_t> next_{0};
    alignas(64) std::atomic<int32_t> arrived_{0};
    alignas(64) std::atomic<uint32_t> round_{0};
    alignas(64) std::atomic<int32_t> error_{0};
};

}  // namespace native
