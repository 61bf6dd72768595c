// The C interface: every operation is `int32_t ultraclean_<op>(const <op>_args *, ith, nth)`, 0 or an error code.
#pragma once
#include <cstdint>

extern "C" {

// Words of the vocabulary, found by fastText's hash: open addressing, a power of two slots.
struct ultraclean_slot {
    uint32_t hash;
    int32_t row;  // -1: empty
    uint32_t begin, length;
};

struct ultraclean_index_args {
    const uint8_t *words;    // all words, one after the other
    const int64_t *offsets;  // [count + 1]
    int64_t count;
    ultraclean_slot *slots;  // [slot_count], zeroed by the caller
    int64_t slot_count;
};

// What a token of the tokenizer is to the classifier: its text, decoded alone, is no word, one, or several.
struct ultraclean_token {
    int32_t hash;   // of the one word; of several: where they begin in `several`
    float scalar;   // of the one word
    uint16_t kind;  // see TokenKind
    uint16_t words;
};

// The collapsed classifier. Everything is shared by all threads and only read.
struct ultraclean_model {
    const float *table;  // [vocabulary + bucket]
    const ultraclean_slot *slots;
    const uint8_t *words;
    int64_t slot_count, vocabulary, bucket;
    int32_t ngrams, pruned;  // pruned: NaN marks a row that the model does not have
};

// One code point -> what it becomes. Two levels of 256; an entry is length << 24 | offset, 0 for "itself"; bit 23 only makes an empty text differ from 0.
struct ultraclean_fold {
    const uint16_t *pages;    // [4352]
    const uint32_t *entries;  // [pages][256]
    const uint8_t *text;
    int32_t newlines;  // at most this many in a row; 0: any number
    int32_t trim;      // drop Unicode white space at both ends
};

// A step of the pre-tokenizer: [class]+, \s?[class]+, \s+$ or [class], each match a piece of its own.
struct ultraclean_split {
    uint8_t mask, space_before, many, at_end;
};

struct ultraclean_bpe {
    const uint16_t *pages;  // code point -> class bits
    const uint8_t *classes;
    const ultraclean_split *splits;
    int64_t split_count;
    const int32_t *bytes;   // [256]: token of a byte
    const uint64_t *pairs;  // [pair_slots][2]: left << 32 | right, rank << 32 | token; all ones: empty
    int64_t pair_slots;
    const ultraclean_token *tokens;
    const ultraclean_token *several;
    const uint8_t *added;  // texts of the added tokens, each ended by a zero: such a document is left alone
    int64_t added_count;
};

// Scores documents. Which of `fold` and `bpe` are there decides how a document is made into words.
struct ultraclean_score_args {
    ultraclean_model model;
    const uint8_t *text;     // UTF-8 of all documents
    const int64_t *offsets;  // [documents + 1], bytes; with `ids`, tokens
    int64_t documents;
    const uint32_t *ids;  // documents as tokens; text is then not read
    const ultraclean_fold *fold;
    const ultraclean_bpe *bpe;
    double *logits;    // [documents]; NaN: no row at all, infinity: left alone, see `bpe.added`
    int64_t *counted;  // [documents]: tokens, or words where there are no tokens
    uint8_t *work;     // [nth][work_stride], kept between calls: its head is the cache of pieces
    int64_t work_stride, expansion;  // expansion: most bytes that a byte of a document can become
};

// fastText's own arithmetic on its own matrices.
struct ultraclean_exact_args {
    ultraclean_model model;  // table is not read
    const uint8_t *text;
    const int64_t *offsets;
    int64_t documents;
    const float *input, *output;  // [vocabulary + bucket, dim], [labels, dim]; need not be aligned
    int64_t dim, labels;
    float *hidden;         // [documents, labels]: probabilities as fastText says them
    uint8_t *work;         // [nth][work_stride]
    int64_t work_stride;
};

// MinHash of the n-grams of words: for each of `hashes` functions, the least of (a·h + b) mod 2⁶⁴, its upper half.
struct ultraclean_minhash_args {
    const uint8_t *text;     // UTF-8 of all documents
    const int64_t *offsets;  // [documents + 1]
    int64_t documents, ngrams, hashes;
    const ultraclean_fold *fold;
    const uint64_t *a, *b;  // [hashes]; a is odd: multiply-shift is then 2-approximately universal
    uint32_t *signatures;   // [documents, hashes]; all ones for a document without a word
    uint64_t *content;      // [documents]: hash of the folded words, equal for equal texts
    uint64_t *grams;        // or null: hashes of document d's n-grams from 2 · offsets[d] + d on
    int64_t *gram_count;    // [documents]: how many there are
    uint8_t *work;          // [nth][work_stride]
    int64_t work_stride, expansion;
};

// Raw text to its words, one space between two: what training reads. Its labels are left out, and what follows its end mark.
struct ultraclean_words_args {
    const uint8_t *text;     // UTF-8 of all documents
    const int64_t *offsets;  // [documents + 1]
    int64_t documents;
    const ultraclean_fold *fold;
    uint8_t *folded;  // room for the longest document, folded
    uint8_t *out;     // room for all
    int64_t *sizes;   // [documents]: bytes of each in `out`; -1: left alone, none
};

// A word that training text has: type 0 is the end mark, whatever the text.
struct ultraclean_type {
    int64_t begin, count;  // begin: in the text, of the first time
    uint32_t hash;
    int32_t length;
};

// Counts the words of documents and makes each a type's number. Stops where the tables are too small, to be called
// again with larger ones.
struct ultraclean_count_args {
    const uint8_t *text;
    const int64_t *offsets;  // [documents + 1], into text
    int64_t documents;
    uint64_t *slots;  // [slot_count], a power of two: hash << 32 | type; 0: empty
    int64_t slot_count;
    ultraclean_type *types;  // [type_room]
    int64_t type_room;
    int32_t *tokens;   // of all documents, each ended by type 0; may be null
    int64_t *lengths;  // [documents]: tokens of each
    int64_t *state;    // documents, types, tokens so far
    int32_t rebuild;   // the slots are new, the types are not
};

// Puts the types of another count into this one's.
struct ultraclean_merge_args {
    ultraclean_count_args into;
    const ultraclean_type *types;
    int64_t count;
    int32_t *becomes;  // [count]: its number in `into`
};

// What the trainer asks of a type of word.
struct ultraclean_feature {
    uint32_t hash;
    int32_t row;  // -1: too rare
};

struct ultraclean_progress {
    double output;     // w_pos - w_neg
    int64_t document;  // next one of the epoch
    int64_t tokens;    // done in all epochs
    int64_t diverged;
};

// Stochastic gradient descent on a fastText classifier of width one.
struct ultraclean_train_args {
    const int32_t *tokens;  // of all documents, as counted
    const int64_t *starts;  // [documents + 1]
    const uint8_t *good;    // [documents]
    const ultraclean_feature *features;  // of each type
    float *table;                        // [vocabulary + bucket]: the input matrix
    int64_t vocabulary, bucket;
    double lr;
    int64_t total;  // tokens of all epochs: the rate falls to nothing over them
    int64_t until;  // stops before this document
    ultraclean_progress *progress;
    uint32_t *rows;  // [ngrams · tokens of the longest document]
    int32_t ngrams;
};
}
