// SPDX-License-Identifier: Apache-2.0
//
// Sequences of the packed cache laid out in device memory as an engine has them: pools of pages in which
// sequences lie scattered, one table of pages, sinks and f16 tokens by sequence. What no token was written to is
// undefined there, so that a kernel which reads it is reported.
#ifndef ATTENTION_DEVICE_H
#define ATTENTION_DEVICE_H

#include <memory>
#include <string>
#include <vector>

#include "attention_oracle.h"
#include "attention_rig.h"
#include "kvq_cuda_attention.h"
#include "simt.h"

// A buffer of which parts are written, by put.
template <typename T> using Partly = simt::Buffer<T>;

// Buffers of any type that live as long as this.
class Owned {
    std::vector<std::shared_ptr<void>> all;

  public:
    template <typename T> T *copy(const char *name, const T *from, size_t n) {
        auto buffer = std::make_shared<simt::Buffer<T>>(name, std::vector<T>(from, from + n));
        all.push_back(buffer);
        return buffer->data();
    }
    template <typename T> Partly<T> *partly(const char *name, size_t n) {
        auto buffer = std::make_shared<Partly<T>>(name, n);
        all.push_back(buffer);
        return buffer.get();
    }
};

struct Device {
    Owned                          owned;
    kvq_cuda_attention_call        call = {};
    std::vector<Partly<uint8_t> *> pages; // of K, of V
    std::vector<int32_t>           table, lengths, coded;
};

static inline kvq_cuda_rows rows_on_device(Owned *to, const kvq_block_spec *s) {
    kvq_cuda_rows rows = {};
    int           groups = s->n_groups > 1 ? s->n_groups : 1;
    size_t        d = (size_t)s->d;
    rows.bits = s->bits;
    rows.n_side = s->n_side;
    rows.n_groups = groups;
    rows.levels = to->copy("levels", kvq_block_decode_levels(s), (size_t)groups << s->bits);
    if (s->r == NULL) return rows;
    rows.z = to->copy("z", s->grid_z != NULL ? s->grid_z : s->z, d);
    rows.r = to->copy("r", s->r, d);
    return rows;
}

static inline kvq_cuda_tile_keys keys_on_device(Owned *to, const kvq_tile_spec *s, int n_levels) {
    kvq_cuda_tile_keys keys = {};
    size_t             d = (size_t)s->d;
    keys.columns = to->copy("columns", s->columns, d);
    keys.table = to->copy("tables", s->table, d);
    keys.levels = to->copy("key levels", s->levels, (size_t)n_levels);
    keys.z = to->copy("z", s->z, d);
    keys.r = to->copy("r", s->r, d);
    keys.code_bytes = kvq_tile_code_bytes(s);
    keys.n_slots = s->n_slots;
    return keys;
}

static inline kvq_cuda_tile_values values_on_device(Owned *to, const kvq_tile_spec *s) {
    kvq_cuda_tile_values values = {};
    size_t               columns = (size_t)(s->d / s->dim), n = (size_t)s->head_dim;
    values.dim = s->dim;
    values.columns = to->copy("columns", s->columns, columns);
    values.table = to->copy("tables", s->table, columns);
    values.levels = to->copy("value levels", s->levels, (size_t)s->dim << s->widths[0]); // of one width
    values.rotation = to->copy("rotation", s->rotation, n * n);
    values.scale_format = s->scale_format;
    values.scale_exponent = s->scale_exponent;
    values.code_bytes = kvq_tile_code_bytes(s);
    return values;
}

// Bytes of a row, or of a tile.
static inline int64_t piece_bytes(const attention_rig *rig, int tensor) {
    return rig->with.tiled ? kvq_tile_bytes(&rig->tiles[tensor]) : kvq_block_row_bytes(&rig->rows[tensor]);
}

// Copies the coded part of a sequence to pages that are not in order, with a gap between pages.
static inline void put_pages(const attention_rig *rig, const attention_sequence *s, size_t seq, Device *to) {
    int64_t n_pages = (s->coded + KVQ_TILE_TOKENS - 1) / KVQ_TILE_TOKENS, n_all = (int64_t)to->table.size();
    for (int64_t i = 0; i < n_pages; i++) {
        int64_t slot = (int64_t)seq * to->call.max_pages + i, page = n_all - 1 - slot;
        int64_t rows =
            s->coded - i * KVQ_TILE_TOKENS < KVQ_TILE_TOKENS ? s->coded - i * KVQ_TILE_TOKENS : KVQ_TILE_TOKENS;
        to->table[(size_t)slot] = (int32_t)page;
        for (int tensor = 0; tensor < 2; tensor++) {
            int64_t stride = tensor == 0 ? to->call.k_page_bytes : to->call.v_page_bytes;
            int64_t piece = piece_bytes(rig, tensor), n = rig->with.tiled ? piece : rows * piece;
            int64_t from = i * (rig->with.tiled ? piece : KVQ_TILE_TOKENS * piece);
            to->pages[(size_t)tensor]->put((size_t)(page * stride), s->parts[1][tensor] + from, (size_t)n);
        }
    }
}

// f16 tokens of a sequence: sinks, and those behind rows or tiles at their places.
static inline void put_halves(const attention_rig *rig, const attention_sequence *s, size_t seq, int tensor,
                              Partly<uint16_t> *sinks, Partly<uint16_t> *recent, int n_recent) {
    size_t  d = (size_t)(rig->with.n_kv_heads * rig->with.head_dim);
    int64_t n_sinks = s->length < rig->with.sinks ? s->length : rig->with.sinks;
    sinks->put(seq * (size_t)rig->with.sinks * d, s->parts[0][tensor], (size_t)n_sinks * d);
    for (int64_t i = 0; i < s->n_waiting; i++) {
        int64_t position = s->length - s->n_waiting + i, at = position - (rig->with.tiled ? 0 : rig->with.sinks);
        size_t  place = seq * (size_t)n_recent + (size_t)(at % n_recent);
        recent->put(place * d, s->parts[2][tensor] + (size_t)i * d * 2, d);
    }
}

static inline void put_rope(const Query &query, int64_t max_length, Device *to) {
    int64_t            n_bases = (max_length + 127) / 128, n = 2 * query.n_pairs;
    std::vector<float> bases((size_t)(n_bases * n)), offsets((size_t)(128 * n));
    to->call.rope.n_pairs = query.n_pairs;
    if (query.n_pairs == 0) return;
    kvq_cuda_rope_fill(query.frequency.data(), query.n_pairs, query.amplitude, n_bases, bases.data(), offsets.data());
    to->call.rope.n_bases = n_bases;
    to->call.rope.bases = to->owned.copy("bases", bases.data(), bases.size());
    to->call.rope.offsets = to->owned.copy("offsets", offsets.data(), offsets.size());
}

static inline void put_spec(const attention_rig *rig, Device *to) {
    to->call.tiled = rig->with.tiled;
    if (rig->with.tiled) {
        to->call.k_tiles = keys_on_device(&to->owned, &rig->tiles[0], rig->n_key_levels);
        to->call.v_tiles = values_on_device(&to->owned, &rig->tiles[1]);
    } else {
        to->call.k_rows = rows_on_device(&to->owned, &rig->rows[0]);
        to->call.v_rows = rows_on_device(&to->owned, &rig->rows[1]);
    }
}

static inline void put_sequences(const attention_rig *rig, const std::vector<attention_sequence> &sequences,
                                 Device *to) {
    kvq_cuda_attention_call &c = to->call;
    size_t                   n = sequences.size(), d = (size_t)(rig->with.n_kv_heads * rig->with.head_dim);
    for (const attention_sequence &s : sequences) {
        to->lengths.push_back((int32_t)s.length);
        to->coded.push_back((int32_t)s.coded);
        c.max_length = s.length > c.max_length ? s.length : c.max_length;
    }
    c.n_seqs = (int)n;
    c.n_sinks = (int)rig->with.sinks;
    c.n_recent = rig->with.tiled ? KVQ_TILE_TOKENS : (int)rig->with.recent;
    c.max_pages = (int)((c.max_length + 127) / 128 + 1);
    to->table.assign(n * (size_t)c.max_pages, 1 << 20); // a page that no pool has
    int64_t per_page = rig->with.tiled ? 1 : KVQ_TILE_TOKENS;
    c.k_page_bytes = per_page * piece_bytes(rig, 0) + 16;
    c.v_page_bytes = per_page * piece_bytes(rig, 1) + 4;
    to->pages = {to->owned.partly<uint8_t>("K pages", to->table.size() * (size_t)c.k_page_bytes),
                 to->owned.partly<uint8_t>("V pages", to->table.size() * (size_t)c.v_page_bytes)};
    Partly<uint16_t> *halves[2][2];
    for (int i = 0; i < 2; i++) {
        halves[0][i] = to->owned.partly<uint16_t>("sinks", n * (size_t)c.n_sinks * d + 1);
        halves[1][i] = to->owned.partly<uint16_t>("recent", n * (size_t)c.n_recent * d + 1);
        for (size_t seq = 0; seq < n; seq++)
            put_halves(rig, &sequences[seq], seq, i, halves[0][i], halves[1][i], c.n_recent);
    }
    for (size_t seq = 0; seq < n; seq++) put_pages(rig, &sequences[seq], seq, to);
    c.k_pages = to->pages[0]->data();
    c.v_pages = to->pages[1]->data();
    c.k_sinks = halves[0][0]->data();
    c.v_sinks = halves[0][1]->data();
    c.k_recent = halves[1][0]->data();
    c.v_recent = halves[1][1]->data();
    c.page_table = to->owned.copy("page table", to->table.data(), to->table.size());
    c.lengths = to->owned.copy("lengths", to->lengths.data(), n);
    c.coded = to->owned.copy("coded", to->coded.data(), n);
}

static inline void put_query(const Query &query, const std::vector<float> &q, Device *to) {
    kvq_cuda_attention_call &c = to->call;
    c.n_heads = query.n_heads;
    c.n_kv_heads = query.n_kv_heads;
    c.head_dim = query.head_dim;
    c.scale = query.scale;
    c.softcap = query.softcap;
    c.window = query.window;
    c.q = to->owned.copy("q", q.data(), q.size());
    put_rope(query, c.max_length, to);
}

// What a sequence decodes to.
static inline Tokens tokens_of(const attention_rig *rig, const attention_sequence &s) {
    Tokens tokens = {s.length, s.k, s.v, std::vector<uint8_t>((size_t)s.length, 0)};
    for (int64_t t = rig->with.sinks; rig->with.tiled && t < s.coded; t++) tokens.rotated[(size_t)t] = 1;
    return tokens;
}

#endif
