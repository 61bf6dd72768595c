// Byte-level BPE: pre-tokenizer steps over classes of characters, merges by rank, a cache of pieces seen before.
#pragma once
#include <algorithm>
#include <queue>
#include <vector>

#include "fold.hpp"
#include "score.hpp"

namespace ultraclean {

enum TokenKind : uint16_t { NONE = 0, ROW = 1, STRANGE = 2, SEVERAL = 3, END = 4, EDGE = 8 };
constexpr uint8_t SPACE = 1, CONTINUES = 128;  // class bits: white space; not the first byte of a character

// The cache at the head of a thread's work: slots, then the bytes of the pieces, then their tokens.
struct Piece {
    uint64_t hash;  // 0: empty
    uint32_t begin, length, tokens, count;
};
struct Cache {
    static constexpr int64_t SLOTS = 1 << 16, FULL = 3 << 14, BYTES = 1 << 20, TOKENS = 1 << 18, LONGEST = 48;
    int64_t held, bytes, tokens, unused;
    Piece pieces[SLOTS];
    uint8_t text[BYTES];
    uint32_t ids[TOKENS];
};

class Bpe {
  public:
    Bpe(const ultraclean_bpe &b, Cache *c) : bpe(b), cache(c) {}

    // Calls token(id) for each token. `scratch` has a byte for each byte of text and one more.
    template <class Token> void encode(const uint8_t *text, int64_t size, uint8_t *classes, uint8_t *breaks, Token token) {
        classify(text, size, classes);
        std::memset(breaks, 0, size + 1);
        breaks[0] = breaks[size] = 1;
        for (int64_t k = 0; k < bpe.split_count; ++k) split(bpe.splits[k], classes, breaks, size);
        for (int64_t begin = 0; begin < size;) {
            const uint8_t *next = static_cast<const uint8_t *>(std::memchr(breaks + begin + 1, 1, size - begin));
            const int64_t end = next - breaks;
            piece(text + begin, end - begin, token);
            begin = end;
        }
    }

  private:
    const ultraclean_bpe &bpe;
    Cache *cache;
    uint32_t ids[512];

    void classify(const uint8_t *text, int64_t size, uint8_t *classes) const {
        const uint8_t *ascii = bpe.classes + int64_t(bpe.pages[0]) * 256;
        for (int64_t i = 0; i < size;) {
            if (text[i] < 0x80) {
                classes[i] = ascii[text[i]], ++i;
                continue;
            }
            int length;
            const uint32_t point = decode(text + i, length);
            classes[i] = bpe.classes[int64_t(bpe.pages[point >> 8]) * 256 + (point & 255)];
            for (int k = 1; k < length; ++k) classes[i + k] = CONTINUES;
            i += length;
        }
    }

    // Marks where the matches of one step begin and end, inside the pieces that there are.
    static void split(const ultraclean_split &s, const uint8_t *cls, uint8_t *breaks, int64_t size) {
        const uint8_t mask = s.mask;
        const auto next = [&](int64_t i) {
            do ++i;
            while (i < size && cls[i] & CONTINUES);
            return i;
        };
        if (s.at_end) {  // \s+$: white space before the end of a piece
            for (int64_t i = 0; i < size;) {
                if (!(cls[i] & mask)) {
                    ++i;
                    continue;
                }
                int64_t end = next(i);
                while (!breaks[end] && cls[end] & mask) end = next(end);
                if (breaks[end]) breaks[i] = 1;
                i = end;
            }
            return;
        }
        for (int64_t i = 0; i < size;) {
            int64_t from = i;
            if (s.space_before && cls[i] & SPACE) {
                from = next(i);
                if (from >= size || breaks[from] || !(cls[from] & mask)) from = i;
            }
            if (!(cls[from] & mask)) {
                ++i;
                continue;
            }
            int64_t end = next(from);
            if (s.many)
                while (!breaks[end] && (cls[end] & mask)) end = next(end);
            breaks[i] = breaks[end] = 1;
            i = end;
        }
    }

    static uint64_t hash_of(const uint8_t *text, int64_t length) {
        uint64_t h = 0x9e3779b97f4a7c15ull * uint64_t(length + 1);
        while (length > 0) {
            uint64_t part = 0;
            std::memcpy(&part, text, length < 8 ? length : 8);
            const __uint128_t product = (__uint128_t)(h ^ part) * 0xd6e8feb86659fd93ull;
            h = uint64_t(product) ^ uint64_t(product >> 64);
            text += 8, length -= 8;
        }
        return h | 1;
    }

    template <class Token> void piece(const uint8_t *text, int64_t length, Token &token) {
        if (length == 1) return token(uint32_t(bpe.bytes[text[0]]));
        if (length > Cache::LONGEST) return merge_long(text, length, token);
        const uint64_t hash = hash_of(text, length);
        uint64_t at = hash >> 20 & (Cache::SLOTS - 1);
        for (; cache->pieces[at].hash; at = (at + 1) & (Cache::SLOTS - 1)) {
            const Piece &p = cache->pieces[at];
            if (p.hash == hash && p.length == length && !std::memcmp(cache->text + p.begin, text, length)) {
                for (uint32_t k = 0; k < p.count; ++k) token(cache->ids[p.tokens + k]);
                return;
            }
        }
        const int64_t count = merge(text, length);
        if (cache->held >= Cache::FULL || cache->bytes + length > Cache::BYTES || cache->tokens + count > Cache::TOKENS) {
            std::memset(cache->pieces, 0, sizeof cache->pieces);  // begin anew: text changes as a corpus goes on
            cache->held = cache->bytes = cache->tokens = 0;
            at = hash >> 20 & (Cache::SLOTS - 1);
        }
        cache->pieces[at] = {hash, uint32_t(cache->bytes), uint32_t(length), uint32_t(cache->tokens), uint32_t(count)};
        std::memcpy(cache->text + cache->bytes, text, length);
        std::memcpy(cache->ids + cache->tokens, ids, count * sizeof *ids);
        ++cache->held, cache->bytes += length, cache->tokens += count;
        for (int64_t k = 0; k < count; ++k) token(ids[k]);
    }

    // rank << 32 | token of a pair; all ones if it does not merge.
    uint64_t pair(uint32_t left, uint32_t right) const {
        const uint64_t key = uint64_t(left) << 32 | right, mask = uint64_t(bpe.pair_slots) - 1;
        for (uint64_t at = key * 0x9e3779b97f4a7c15ull >> 32 & mask;; at = (at + 1) & mask) {
            const uint64_t *slot = bpe.pairs + 2 * at;
            if (slot[0] == key || slot[1] == ~uint64_t(0)) return slot[1];
        }
    }

    // The lowest rank first, of equal ranks the leftmost: by looking through all, which for few is quickest.
    int64_t merge(const uint8_t *text, int64_t length) {
        uint64_t found[Cache::LONGEST];
        int64_t n = length;
        for (int64_t i = 0; i < n; ++i) ids[i] = uint32_t(bpe.bytes[text[i]]);
        for (int64_t i = 0; i + 1 < n; ++i) found[i] = pair(ids[i], ids[i + 1]);
        while (n > 1) {
            int64_t best = 0;
            for (int64_t i = 1; i + 1 < n; ++i)
                if (found[i] >> 32 < found[best] >> 32) best = i;
            if (found[best] == ~uint64_t(0)) break;
            ids[best] = uint32_t(found[best]);
            --n;
            for (int64_t i = best + 1; i < n; ++i) ids[i] = ids[i + 1];
            for (int64_t i = best + 1; i + 1 < n; ++i) found[i] = found[i + 1];
            if (best + 1 < n) found[best] = pair(ids[best], ids[best + 1]);
            if (best > 0) found[best - 1] = pair(ids[best - 1], ids[best]);
        }
        return n;
    }

    // The same with a heap, for pieces without a bound: the only place that allocates.
    template <class Token> void merge_long(const uint8_t *text, int64_t length, Token &token) {
        struct Candidate {
            uint64_t merged;  // rank << 32 | token
            int64_t at;
            uint32_t left, right;
            bool operator<(const Candidate &o) const {
                const uint64_t a = merged >> 32, b = o.merged >> 32;
                return a != b ? a > b : at > o.at;
            }
        };
        constexpr uint32_t GONE = ~uint32_t(0);
        std::vector<uint32_t> symbol(length);
        std::vector<int64_t> previous(length), following(length);
        std::priority_queue<Candidate> queue;
        const auto offer = [&](int64_t i) {
            if (i < 0 || following[i] >= length) return;
            const uint64_t merged = pair(symbol[i], symbol[following[i]]);
            if (merged != ~uint64_t(0)) queue.push({merged, i, symbol[i], symbol[following[i]]});
        };
        for (int64_t i = 0; i < length; ++i) symbol[i] = uint32_t(bpe.bytes[text[i]]), previous[i] = i - 1, following[i] = i + 1;
        for (int64_t i = 0; i < length; ++i) offer(i);
        while (!queue.empty()) {
            const Candidate c = queue.top();
            queue.pop();
            const int64_t right = following[c.at];
            if (symbol[c.at] != c.left || right >= length || symbol[right] != c.right) continue;
            symbol[c.at] = uint32_t(c.merged), symbol[right] = GONE;
            following[c.at] = following[right];
            if (following[right] < length) previous[following[right]] = c.at;
            offer(previous[c.at]), offer(c.at);
        }
        for (int64_t i = 0; i < length; i = following[i]) token(symbol[i]);
    }
};

// Scores documents `ith`, `ith + nth`, … by the way that the arguments ask for.
inline int32_t score(const ultraclean_score_args *a, int32_t ith, int32_t nth) {
    constexpr double LEFT_ALONE = std::numeric_limits<double>::infinity();
    Sum sum(a->model);
    if (a->model.ngrams > 16 || a->model.slot_count & (a->model.slot_count - 1)) return 1;
    uint8_t *work = a->work + ith * a->work_stride;
    Cache *cache = reinterpret_cast<Cache *>(work);
    uint8_t *scratch = work + (sizeof(Cache) + 63) / 64 * 64;
    for (int64_t doc = ith; doc < a->documents; doc += nth) {
        const int64_t begin = a->offsets[doc], given = a->offsets[doc + 1] - begin;
        int64_t tokens = 0, first = -1, last = -1;
        bool ended = false;
        sum.begin();
        const auto token = [&](uint32_t id) {
            ++tokens;
            const ultraclean_token &t = a->bpe->tokens[id];
            if (!t.kind || ended) return;
            if (first < 0) first = t.kind & EDGE;
            last = t.kind & EDGE;
            const int64_t count = (t.kind & 7) == SEVERAL ? t.words : 1;
            const ultraclean_token *word = (t.kind & 7) == SEVERAL ? a->bpe->several + t.hash : &t;
            for (int64_t k = 0; k < count && !ended; ++k) {
                if ((word[k].kind & 7) == END) ended = true;
                else sum.add(uint32_t(word[k].hash), word[k].scalar, (word[k].kind & 7) == ROW);
            }
        };
        const auto finish_tokens = [&] {
            static const uint8_t end[] = {'<', '/', 's', '>'};
            sum.add_word(end, 4, word_hash(end, 4));
            a->logits[doc] = first > 0 || last > 0 ? LEFT_ALONE : sum.finish();
            a->counted[doc] = tokens;
        };
        if (a->ids) {
            for (int64_t i = 0; i < given; ++i) token(a->ids[begin + i]);
            finish_tokens();
            continue;
        }
        const uint8_t *text = a->text + begin;
        int64_t size = given;
        if (a->fold) {
            size = fold(*a->fold, text, size, scratch);
            text = scratch;
            if (size < 0) {
                a->logits[doc] = LEFT_ALONE, a->counted[doc] = 0;
                continue;
            }
            if (a->fold->trim) trim(text, size);
        }
        if (!a->bpe) {
            score_words(sum, text, size);
            a->logits[doc] = sum.finish(), a->counted[doc] = sum.words - 1;
            continue;
        }
        bool added = false;
        const uint8_t *name = a->bpe->added;
        for (int64_t k = 0; k < a->bpe->added_count && !added; ++k) {
            const int64_t length = int64_t(std::strlen(reinterpret_cast<const char *>(name)));
            added = memmem(text, size, name, length) != nullptr;
            name += length + 1;
        }
        if (added) {
            a->logits[doc] = LEFT_ALONE, a->counted[doc] = 0;
            continue;
        }
        const int64_t room = given * a->expansion + 64;
        Bpe(*a->bpe, cache).encode(text, size, scratch + room, scratch + 2 * room, token);
        finish_tokens();
    }
    return 0;
}

}  // namespace ultraclean
