/* From the file's bit planes to units of code vectors, cluster by cluster on all threads. */
#include "repack.h"

#include <stdlib.h>

/* What the depths of a cluster tell: columns of each, and whether the shared order sorts them. */
typedef struct {
    int32_t have[9];
    int32_t is_sorted;
} cluster_depths;

typedef struct {
    cvxq_matrix *w;
    const cvxq_companded *source;
    cluster_depths *found;     /* (clusters,) */
    const int64_t *code_start; /* (clusters,): first byte in the file */
    const int64_t *first_row;  /* (clusters + 1,): first stored position */
    int64_t *scratch;          /* (threads, 2, K) */
} repack_job;

static void look_at_depths(const uint8_t *depths, const int32_t *order, int64_t columns,
                           cluster_depths *found) {
    /* Where depths never fall, the last column of each says how many there are. */
    int32_t end[9] = {0};
    int fell = 0, before = 0;
    for (int64_t k = 0; k < columns; k++) {
        const int depth = depths[order ? order[k] : k];
        fell |= depth < before;
        before = depth;
        end[depth] = (int32_t)k + 1;
    }
    found->is_sorted = !fell;
    memset(found->have, 0, sizeof found->have);
    if (fell) {
        for (int64_t k = 0; k < columns; k++) found->have[depths[k]]++;
        return;
    }
    for (int32_t depth = 0, first = 0; depth <= 8; depth++) {
        if (end[depth]) {
            found->have[depth] = end[depth] - first;
            first = end[depth];
        }
    }
}

/* Columns by depth, equal ones in their natural order. */
static void sort_columns(const uint8_t *depths, int64_t columns, int32_t *order) {
    int64_t at[10] = {0};
    for (int64_t k = 0; k < columns; k++) at[depths[k] + 1]++;
    for (int depth = 1; depth < 10; depth++) at[depth] += at[depth - 1];
    for (int64_t k = 0; k < columns; k++) order[at[depths[k]]++] = (int32_t)k;
}

/* Find runs and, where the shared order does not sort a cluster, an order of its own. */
static int plan_clusters(cvxq_matrix *w, const cvxq_companded *source,
                         const cluster_depths *found) {
    const int64_t columns = w->inputs, count = w->cluster_count;
    int64_t own = 0;
    for (int64_t c = 0; c < count; c++) own += !found[c].is_sorted;
    w->runs = calloc((size_t)count * 9, sizeof *w->runs);
    w->clusters = calloc((size_t)count, sizeof *w->clusters);
    if (own) w->cluster_orders = malloc((size_t)(own * columns) * sizeof *w->cluster_orders);
    if (!w->runs || !w->clusters || (own && !w->cluster_orders)) return 0;
    int32_t runs = 0;
    int32_t *order = w->cluster_orders;
    for (int64_t c = 0; c < count; c++) {
        cvxq_cluster *cluster = &w->clusters[c];
        if (!found[c].is_sorted) {
            sort_columns(source->depths + c * columns, columns, order);
            cluster->order = order;
            order += columns;
        }
        cluster->first_run = runs;
        for (int32_t depth = 0, first = 0; depth <= 8; first += found[c].have[depth++]) {
            const int32_t have = found[c].have[depth];
            if (!have || (!depth && !source->mean_codes)) continue;
            w->runs[runs++] = (cvxq_run){depth, first, have};
            if (depth) cluster->blocks += (int32_t)ceil_div(have, BLOCK);
            if (depth > w->deepest) w->deepest = depth;
        }
        cluster->runs = runs - cluster->first_run;
        w->most_blocks = max_of(w->most_blocks, cluster->blocks);
    }
    w->bytes += own * columns * 4 + runs * (int64_t)sizeof *w->runs +
                count * (int64_t)sizeof *w->clusters;
    return 1;
}

static int64_t tile_bytes(const cvxq_matrix *w, const cvxq_cluster *cluster, int strips) {
    int64_t bytes = 0;
    for (int32_t r = 0; r < cluster->runs; r++) {
        const cvxq_run *run = &w->runs[cluster->first_run + r];
        bytes += ceil_div(run->count, unit_columns(strips)) * VECTOR * run->depth;
    }
    return bytes;
}

/* Cut clusters into tiles and tiles into items of work, and say where every row goes. */
static int plan_tiles(cvxq_matrix *w, const cvxq_companded *source, const int64_t *first_row) {
    int64_t most = 0;
    for (int64_t c = 0; c < w->cluster_count; c++)
        most += (first_row[c + 1] - first_row[c]) / TILE + 2;
    w->tiles = calloc((size_t)most, sizeof *w->tiles);
    w->items = calloc((size_t)most, sizeof *w->items);
    w->tile_cluster = calloc((size_t)most, sizeof *w->tile_cluster);
    w->targets = malloc((size_t)(most * TILE) * sizeof *w->targets);
    w->places = calloc((size_t)w->outputs, sizeof *w->places);
    if (!w->tiles || !w->items || !w->tile_cluster || !w->targets || !w->places) return 0;
    int64_t tile = 0, item = 0, bytes = 0;
    for (int64_t c = 0; c < w->cluster_count; c++) {
        int64_t in_cluster = 0;
        for (int64_t row = first_row[c]; row < first_row[c + 1]; tile++, in_cluster++) {
            const int64_t strips_left = ceil_div(first_row[c + 1] - row, STRIP);
            const int strips = strips_left >= 4 ? 4 : strips_left >= 2 ? 2 : 1;
            if (in_cluster % ITEM_TILES == 0)
                w->items[item++] = (cvxq_item){(int32_t)c, (int32_t)tile, 0};
            w->items[item - 1].tiles++;
            w->tiles[tile] = (cvxq_tile){bytes, strips};
            w->tile_cluster[tile] = (int32_t)c;
            for (int lane = 0; lane < TILE; lane++) {
                int32_t *target = &w->targets[tile * TILE + lane];
                *target = -1;
                if (lane >= strips * STRIP) continue;
                const int64_t at = row + lane_row(strips, lane / STRIP, lane % STRIP);
                if (at >= first_row[c + 1]) continue;
                *target = (int32_t)(source->permutation ? source->permutation[at] : at);
                w->places[*target] = (int32_t)(tile * TILE + lane);
            }
            bytes += tile_bytes(w, &w->clusters[c], strips);
            row += strips * STRIP;
        }
    }
    w->tile_count = tile;
    w->item_count = item;
    w->code_bytes = bytes;
    w->bytes += tile * (int64_t)(sizeof *w->tiles + 4 + 4 * TILE) + 4 * w->outputs +
                item * (int64_t)sizeof *w->items + bytes;
    return 1;
}

/* values (N,) in the order of the tiles' lanes; NULL without memory. */
static float *in_lanes(cvxq_matrix *w, const float *values) {
    float *made = calloc((size_t)(w->tile_count * TILE), sizeof *made);
    for (int64_t n = 0; made && n < w->outputs; n++) made[w->places[n]] = values[n];
    w->bytes += 4 * TILE * w->tile_count;
    return made;
}

/* One run of a tile, any shape; `first` is the tile's first row in the cluster. */
static void repack_run(const cvxq_run *run, const uint8_t *codes, const int64_t *starts, int strips,
                       int64_t plane, int64_t first, uint8_t *out) {
    const int64_t rows = strips * STRIP, bytes = min_of(rows / 8, plane - first / 8);
    const int per_unit = (int)unit_columns(strips);
    for (int64_t i = 0; i < run->count; i += per_unit, out += VECTOR * run->depth) {
        _Alignas(64) uint8_t columns[UNIT * VECTOR] = {0};
        _Alignas(64) uint8_t unit[UNIT][VECTOR];
        for (int64_t j = 0; j < min_of(per_unit, run->count - i); j++)
            cvxq_spread(codes + starts[i + j], run->depth, plane, first / 8, bytes,
                        columns + j * rows);
        cvxq_interleave(columns, strips, unit);
        cvxq_pack_unit(run->depth, unit, out);
    }
}

/* Codes of one tile. starts (K,): first byte of each column, in the cluster's order; `first` is the
 * tile's first row in the cluster, `height` the cluster's rows. */
static void repack_tile(const repack_job *job, const cvxq_cluster *cluster, const cvxq_tile *tile,
                        const int64_t *starts, int64_t first, int64_t height) {
    const cvxq_matrix *w = job->w;
    const uint8_t *codes = job->source->codes;
    const int64_t plane = (height + 7) / 8;
    const cvxq_repack_run fast = cvxq_ops_in_use()->repack_run;
    uint8_t *out = w->codes + tile->codes;
    for (int32_t r = 0; r < cluster->runs; r++) {
        const cvxq_run *run = &w->runs[cluster->first_run + r];
        if (!run->depth) continue;
        const int64_t *from = starts + run->first;
        /* The usual case: a tile of four strips that is a whole cluster. */
        if (fast && tile->strips == 4 && plane == 8)
            fast(run->depth, codes, from, run->count, out);
        else
            repack_run(run, codes, from, tile->strips, plane, first, out);
        out += ceil_div(run->count, unit_columns(tile->strips)) * VECTOR * run->depth;
    }
}

/* scratch: (2, K) */
static void repack_cluster(const repack_job *job, int64_t c, int64_t *scratch) {
    cvxq_matrix *w = job->w;
    const cvxq_companded *source = job->source;
    const cvxq_cluster *cluster = &w->clusters[c];
    const int32_t *order = cluster->order ? cluster->order : w->order;
    const int64_t columns = w->inputs, groups = c * columns;
    const int64_t height = job->first_row[c + 1] - job->first_row[c], plane = (height + 7) / 8;
    const uint8_t *depths = source->depths + groups, *scales = source->scale_codes + groups;
    uint8_t *to = w->scale_codes + groups; /* bytes may alias anything: pointers are kept here */
    int64_t *starts = scratch, *natural = scratch + columns, at = job->code_start[c];
    for (int64_t k = 0; k < columns; k++) {
        natural[k] = at;
        __builtin_prefetch(source->codes + at); /* wanted soon, in another order */
        at += depths[k] * plane;
    }
    for (int64_t k = 0; k < columns; k++) {
        const int64_t from = order ? order[k] : k;
        starts[k] = natural[from];
        to[k] = scales[from];
    }
    for (int64_t k = 0; w->mean_codes && k < columns; k++)
        w->mean_codes[groups + k] = source->mean_codes[groups + (order ? order[k] : k)];
    /* Tiles of a cluster follow each other; the first one is found from its first row's place. */
    const int64_t row = job->first_row[c];
    int64_t tile = w->places[source->permutation ? source->permutation[row] : row] / TILE;
    for (int64_t first = 0; first < height; tile++) {
        repack_tile(job, cluster, &w->tiles[tile], starts, first, height);
        first += w->tiles[tile].strips * STRIP;
    }
}

static void look_at_cluster(const void *context, int64_t c, int thread) {
    const repack_job *job = context;
    const int64_t columns = job->w->inputs;
    (void)thread;
    look_at_depths(job->source->depths + c * columns, job->source->order, columns, &job->found[c]);
}

static void repack_on(const void *context, int64_t c, int thread) {
    const repack_job *job = context;
    repack_cluster(job, c, job->scratch + thread * 2 * job->w->inputs);
}

/* First stored position and first code byte of each cluster; the bytes of all codes. */
static int64_t find_clusters(const cvxq_companded *source, const cluster_depths *found,
                             int64_t *first_row, int64_t *code_start) {
    const int64_t part = source->rows / source->partitions;
    int64_t c = 0, at = 0;
    for (int64_t p = 0; p < source->partitions; p++)
        for (int64_t i = 0; i < part; i += source->group_size, c++) {
            const int64_t height = min_of(source->group_size, part - i);
            first_row[c] = p * part + i;
            code_start[c] = at;
            for (int depth = 1; depth <= 8; depth++)
                at += depth * (int64_t)found[c].have[depth] * ((height + 7) / 8);
        }
    first_row[c] = source->rows;
    return at;
}

int cvxq_repack(cvxq_pool *pool, cvxq_matrix *w, const cvxq_companded *source) {
    const int64_t columns = w->inputs;
    const int64_t count = source->partitions *
                          ceil_div(source->rows / source->partitions, source->group_size);
    const size_t groups = (size_t)(count * columns);
    int64_t *first_row = malloc(sizeof(int64_t) * (size_t)(2 * count + 1));
    int64_t *scratch = malloc(sizeof(int64_t) * (size_t)(cvxq_pool_threads(pool) * 2 * columns));
    w->cluster_count = count;
    w->scale_codes = malloc(groups + GROUP_PAD);
    if (source->mean_codes) w->mean_codes = malloc(groups + GROUP_PAD);
    if (source->order) w->order = malloc(sizeof *w->order * (size_t)columns);
    int is_whole = first_row && scratch && w->scale_codes &&
                   (w->mean_codes || !source->mean_codes) && (w->order || !source->order);
    if (is_whole && source->order)
        memcpy(w->order, source->order, sizeof *w->order * (size_t)columns);
    cluster_depths *found = malloc(sizeof *found * (size_t)count);
    is_whole = is_whole && found;
    repack_job job = {w, source, found, first_row + count + 1, first_row, scratch};
    if (is_whole) cvxq_pool_each(pool, look_at_cluster, &job, count);
    is_whole = is_whole &&
               find_clusters(source, found, first_row, first_row + count + 1) ==
                   source->code_bytes &&
               plan_clusters(w, source, found) && plan_tiles(w, source, first_row) &&
               (!w->row_scales || (w->lane_scales = in_lanes(w, w->row_scales))) &&
               (!w->bias || (w->lane_bias = in_lanes(w, w->bias))) &&
               (w->codes = cvxq_arena_new_in((size_t)w->code_bytes, w->file));
    if (is_whole) {
        cvxq_pool_each(pool, repack_on, &job, count);
        w->bytes += (int64_t)groups * (1 + !!source->mean_codes) + (w->order ? 4 * columns : 0);
    }
    free(found);
    free(first_row);
    free(scratch);
    return is_whole;
}
