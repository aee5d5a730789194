// SPDX-License-Identifier: Apache-2.0
//
// Containers of the tokenizer: growing arrays, and hash tables with open addressing and linear probing. Tables only
// grow, so there is nothing to delete and a probe ends at the first free slot.
#include <string.h>

#include "tokenizer_impl.h"

struct tok_slot {
    size_t   at; // of the key in keys
    uint32_t n, hash;
    int32_t  value; // -1 = free
};

kvq_status tok_grow(const kvq_context *ctx, int64_t n, int64_t *capacity, size_t size, void **data, kvq_error *err) {
    if (n < *capacity) return KVQ_OK;
    void      *larger = NULL;
    int64_t    new_capacity = *capacity < 16 ? 16 : *capacity * 2;
    kvq_status status = kvq_alloc(ctx, new_capacity, size, "tokenizer", &larger, err);
    if (status != KVQ_OK) return status;
    if (n > 0) memcpy(larger, *data, (size_t)n * size);
    kvq_free(ctx, *data);
    *data = larger;
    *capacity = new_capacity;
    return KVQ_OK;
}

kvq_status tok_text_append(const kvq_context *ctx, tok_text *text, const char *data, size_t n, kvq_error *err) {
    if (n == 0) return KVQ_OK;
    if (n > text->capacity - text->n) {
        char  *larger = NULL;
        size_t needed = text->n + n, doubled = text->capacity * 2;
        size_t new_capacity = needed > doubled ? needed : doubled;
        if (new_capacity > INT64_MAX || needed < n)
            return kvq_fail(err, KVQ_ERR_MEMORY, NULL, "a text of %zu bytes and more", n);
        kvq_status status = KVQ_NEW(ctx, (int64_t)new_capacity, "text", &larger, err);
        if (status != KVQ_OK) return status;
        if (text->n > 0) memcpy(larger, text->data, text->n);
        kvq_free(ctx, text->data);
        text->data = larger;
        text->capacity = new_capacity;
    }
    memcpy(text->data + text->n, data, n);
    text->n += n;
    return KVQ_OK;
}

kvq_status tok_ids_push(const kvq_context *ctx, kvq_ids *ids, int32_t id, kvq_error *err) {
    void      *data = ids->data;
    kvq_status status = tok_grow(ctx, ids->count, &ids->capacity, sizeof *ids->data, &data, err);
    if (status != KVQ_OK) return status;
    ids->data = data;
    ids->data[ids->count++] = id;
    return KVQ_OK;
}

// ---------------------------------------------------------------- strings

// FNV-1a, folded: keys are short, and the low bits of the product depend on all bytes.
static uint32_t hash_bytes(const char *key, size_t n) {
    uint64_t hash = 0xcbf29ce484222325u;
    for (size_t i = 0; i < n; i++) hash = (hash ^ (uint8_t)key[i]) * 0x100000001b3u;
    return (uint32_t)(hash ^ (hash >> 32));
}

// Slot that holds the key, or the free slot where it belongs. The table has at least one free slot.
static struct tok_slot *string_slot(const tok_table *table, const char *key, size_t n, uint32_t hash) {
    for (size_t i = hash;; i++) {
        struct tok_slot *slot = &table->slots[i & (table->n_slots - 1)];
        if (slot->value < 0) return slot;
        if (slot->hash == hash && slot->n == n && memcmp(table->keys.data + slot->at, key, n) == 0) return slot;
    }
}

int32_t tok_table_find(const tok_table *table, const char *key, size_t n) {
    if (table->n == 0 || n == 0) return -1;
    return string_slot(table, key, n, hash_bytes(key, n))->value;
}

const char *tok_table_key(const tok_table *table, int32_t value, size_t *n) {
    for (size_t i = 0; i < table->n_slots; i++) {
        if (table->slots[i].value != value) continue;
        *n = table->slots[i].n;
        return table->keys.data + table->slots[i].at;
    }
    return NULL;
}

static kvq_status widen_table(const kvq_context *ctx, tok_table *table, kvq_error *err) {
    tok_table  wide = *table;
    size_t     n_slots = table->n_slots == 0 ? 64 : table->n_slots * 2;
    kvq_status status = KVQ_NEW(ctx, (int64_t)n_slots, "tokenizer table", &wide.slots, err);
    if (status != KVQ_OK) return status;
    wide.n_slots = n_slots;
    for (size_t i = 0; i < n_slots; i++) wide.slots[i].value = -1;
    for (size_t i = 0; i < table->n_slots; i++) {
        const struct tok_slot *old = &table->slots[i];
        if (old->value >= 0) *string_slot(&wide, table->keys.data + old->at, old->n, old->hash) = *old;
    }
    kvq_free(ctx, table->slots);
    *table = wide;
    return KVQ_OK;
}

kvq_status tok_table_put(const kvq_context *ctx, tok_table *table, const char *key, size_t n, int32_t value,
                         kvq_error *err) {
    kvq_status status = KVQ_OK;
    if (n == 0 || n > UINT32_MAX || value < 0)
        return kvq_fail(err, KVQ_ERR_INTERNAL, NULL, "table key of %zu bytes, value %d", n, value);
    if ((table->n + 1) * 4 > table->n_slots * 3) KVQ_TRY(widen_table(ctx, table, err));
    uint32_t         hash = hash_bytes(key, n);
    struct tok_slot *slot = string_slot(table, key, n, hash);
    if (slot->value < 0) {
        size_t at = table->keys.n;
        KVQ_TRY(tok_text_append(ctx, &table->keys, key, n, err));
        *slot = (struct tok_slot){.at = at, .n = (uint32_t)n, .hash = hash};
        table->n++;
    }
    slot->value = value;
done:
    return status;
}

void tok_table_free(const kvq_context *ctx, tok_table *table) {
    kvq_free(ctx, table->keys.data);
    kvq_free(ctx, table->slots);
    *table = (tok_table){0};
}

// ---------------------------------------------------------------- pairs

static tok_pair *pair_slot(const tok_pairs *pairs, uint64_t key) {
    uint64_t hash = key * 0x9e3779b97f4a7c15u; // Fibonacci hashing: the high bits are the mixed ones
    for (size_t i = hash >> 32;; i++) {
        tok_pair *slot = &pairs->slots[i & (pairs->n_slots - 1)];
        if (slot->key == key || slot->key == TOK_NO_PAIR) return slot;
    }
}

const tok_pair *tok_pairs_find(const tok_pairs *pairs, uint32_t left, uint32_t right) {
    if (pairs->n == 0) return NULL;
    const tok_pair *slot = pair_slot(pairs, (uint64_t)left << 32 | right);
    return slot->key == TOK_NO_PAIR ? NULL : slot;
}

static kvq_status widen_pairs(const kvq_context *ctx, tok_pairs *pairs, kvq_error *err) {
    tok_pairs  wide = *pairs;
    size_t     n_slots = pairs->n_slots == 0 ? 64 : pairs->n_slots * 2;
    kvq_status status = KVQ_NEW(ctx, (int64_t)n_slots, "tokenizer merges", &wide.slots, err);
    if (status != KVQ_OK) return status;
    wide.n_slots = n_slots;
    for (size_t i = 0; i < n_slots; i++) wide.slots[i].key = TOK_NO_PAIR;
    for (size_t i = 0; i < pairs->n_slots; i++) {
        if (pairs->slots[i].key != TOK_NO_PAIR) *pair_slot(&wide, pairs->slots[i].key) = pairs->slots[i];
    }
    kvq_free(ctx, pairs->slots);
    *pairs = wide;
    return KVQ_OK;
}

kvq_status tok_pairs_put(const kvq_context *ctx, tok_pairs *pairs, uint32_t left, uint32_t right, uint32_t rank,
                         int32_t merged, kvq_error *err) {
    kvq_status status = KVQ_OK;
    if ((pairs->n + 1) * 2 > pairs->n_slots) KVQ_TRY(widen_pairs(ctx, pairs, err));
    uint64_t  key = (uint64_t)left << 32 | right;
    tok_pair *slot = pair_slot(pairs, key);
    if (slot->key == TOK_NO_PAIR) pairs->n++;
    *slot = (tok_pair){key, rank, merged};
done:
    return status;
}

void tok_pairs_free(const kvq_context *ctx, tok_pairs *pairs) {
    kvq_free(ctx, pairs->slots);
    *pairs = (tok_pairs){0};
}
