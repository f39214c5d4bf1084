/* part types */
/* A value in the arena: int32 ("words"), or bytes q + zero. */
struct value {
    uint32_t at; /* bytes from the arena's beginning; of words a multiple of 4 */
    uint8_t words;
    uint8_t zero;
};

/* Where a convolution or pooling looks. Values are (height, width, channels), channels last. */
struct window {
    int32_t in_height, in_width, in_channels;
    int32_t out_height, out_width, out_channels;
    int32_t kernel_height, kernel_width;
    int32_t stride_height, stride_width;
    int32_t top, left; /* padding, which is zero; at the other ends there is as much as needed */
    int32_t dilation_height, dilation_width;
};

/* Of a sum v, the integer round(v factor / 2^shift) between low and high; without a factor round(v / 2^shift). */
struct output {
    struct value value;
    int32_t low, high;
    int32_t factor;
    uint8_t shift;
    uint8_t sign; /* the sign of v, -1 or 1, in its place */
    uint8_t left; /* v 2^left in place of v, for a value that is much finer than v */
};

/* What is added to a sum before that: the value's integers times factor 2^left. */
struct residual {
    struct value value;
    int32_t factor;
    uint8_t left;
};

/* Numbers with one exponent: times x each is round(x 2^left mantissa / 2^shift). */
struct factors {
    const int32_t *mantissas;
    uint8_t left, shift;
};

/* A function as a piece of a parabola for each of `segments` equal parts of its domain: three coefficients each. */
struct table {
    const int32_t *coefficients;
    int32_t segments, start;
    uint8_t fraction; /* binary digits of a place within a segment */
    uint8_t guard;    /* binary digits that results have more than coefficients */
};

/* What becomes of a sum: v = sum multiplier 2^left + offset 2^offset_left + residuals, its function, and its outputs. */
struct epilogue {
    uint8_t per_channel; /* 0: one multiplier and offset are for all channels */
    uint8_t offset_left;
    uint8_t residual_count, output_count;
    const int32_t *multipliers;
    const uint8_t *lefts;
    const int32_t *offsets;
    struct residual residuals[MOST_RESIDUALS];
    struct output outputs[MOST_OUTPUTS];
    struct factors slopes;     /* by which v below zero is multiplied, if there are any */
    const struct table *table; /* what becomes of v, if there is one */
};

/* Everything that is computed lives here; a place is used again once what it held was read for the last time. */
static union {
    int32_t words[ARENA_WORDS];
    uint8_t bytes[4 * ARENA_WORDS];
} arena;

/* Numbers below zero must be shifted right as by every known compiler: towards minus infinity. */
typedef char shifts_keep_the_sign[(-3 >> 1) == -2 ? 1 : -1];

/* part left_shift */
/* Multiply by a power of two; the exporter has made sure that the product is below 2^62. */
static int64_t left_shift(int64_t number, int left)
{
    return (int64_t)((uint64_t)number << left);
}

/* part round_shift */
/* Divide by 2^shift, 1 to 62, and round to the nearest integer, ties to the even one. */
static int64_t round_shift(int64_t number, int shift)
{
    const int64_t odd = (number >> shift) & 1;
    return (number + (((int64_t)1 << (shift - 1)) - 1) + odd) >> shift;
}

/* part scaled */
/* Multiply by factor / 2^shift, 32 to 93, and round once, as above. The product has 93 bits: it is made of two halves. */
static int64_t scaled(int64_t number, int32_t factor, int shift)
{
    const int64_t low = (number & 0x7fffffff) * factor;
    const int64_t top = (number >> 31) * factor + (low >> 31);
    const int64_t kept = top >> (shift - 31);
    const int64_t lost = top - left_shift(kept, shift - 31);
    const int64_t half = (int64_t)1 << (shift - 32);
    if (lost > half || (lost == half && ((low & 0x7fffffff) != 0 || (kept & 1) != 0)))
        return kept + 1;
    return kept;
}

/* part near */
/* Multiply by 2^left a number that matters only if it is below 2^(61 - left). */
static int64_t near(int64_t number, int left)
{
    const int64_t limit = (int64_t)1 << (61 - left);
    if (number > limit)
        number = limit;
    if (number < -limit)
        number = -limit;
    return left_shift(number, left);
}

/* part times */
static int64_t times(const struct factors *factors, int32_t index, int64_t number)
{
    return scaled(left_shift(number, factors->left), factors->mantissas[index], factors->shift);
}

/* part bent */
/* Look a function up: the outermost segments are straight lines, and go on. */
static int64_t bent(const struct table *table, int64_t v)
{
    const int32_t last = table->segments - 1;
    int64_t segment = (v >> table->fraction) + table->start;
    if (segment < 0)
        segment = 0;
    if (segment > last)
        segment = last;
    const int32_t *c = &table->coefficients[3 * segment];
    const int64_t rest = v - left_shift(segment - table->start, table->fraction);
    if (segment == 0 || segment == last)
        return left_shift(c[0], table->guard) + scaled(rest, c[1], table->fraction - table->guard);
    const int64_t place = rest >> (table->fraction - 30);
    return left_shift(c[0], table->guard) + (((c[1] + (c[2] * place >> 30)) * place) >> (30 - table->guard));
}

/* part store */
static void store(const struct value *value, int32_t index, int32_t number)
{
    if (value->words)
        arena.words[value->at / 4 + (uint32_t)index] = number;
    else
        arena.bytes[value->at + (uint32_t)index] = (uint8_t)(number + value->zero);
}

/* part load */
static int32_t load(const struct value *value, int32_t index)
{
    if (value->words)
        return arena.words[value->at / 4 + (uint32_t)index];
    return (int32_t)arena.bytes[value->at + (uint32_t)index] - value->zero;
}

/* part function_of_none */
static int64_t function(const struct epilogue *e, int32_t c, int64_t v)
{
    (void)e;
    (void)c;
    return v;
}

/* part function_of_slopes */
static int64_t function(const struct epilogue *e, int32_t c, int64_t v)
{
    if (e->slopes.mantissas && v < 0)
        return times(&e->slopes, c, v);
    return v;
}

/* part function_of_tables */
static int64_t function(const struct epilogue *e, int32_t c, int64_t v)
{
    (void)c;
    return e->table ? bent(e->table, v) : v;
}

/* part function_of_both */
static int64_t function(const struct epilogue *e, int32_t c, int64_t v)
{
    if (e->slopes.mantissas && v < 0)
        v = times(&e->slopes, c, v);
    return e->table ? bent(e->table, v) : v;
}

/* part finish */
/* Make the outputs' numbers at an index out of a sum. */
static void finish(const struct epilogue *e, int32_t index, int32_t channel, int64_t sum)
{
    const int32_t c = e->per_channel ? channel : 0;
    int64_t v = left_shift(sum * e->multipliers[c], e->lefts[c]) + left_shift(e->offsets[c], e->offset_left);
    for (int i = 0; i < e->residual_count; i++) {
        const struct residual *r = &e->residuals[i];
        v += left_shift((int64_t)load(&r->value, index) * r->factor, r->left);
    }
    v = function(e, c, v);
    for (int i = 0; i < e->output_count; i++) {
        const struct output *o = &e->outputs[i];
        int64_t number;
        if (o->sign)
            number = v >= 0 ? 1 : -1;
        else if (o->factor)
            number = scaled(o->left ? near(v, o->left) : v, o->factor, o->shift);
        else
            number = round_shift(v, o->shift);
        if (number < o->low)
            number = o->low;
        if (number > o->high)
            number = o->high;
        store(&o->value, index, (int32_t)number);
    }
}

/* part convolution_type */
struct convolution {
    struct value input;
    struct window window;
    int32_t groups;
    const int8_t *weights;  /* (out_channels, kernel_height, kernel_width, in_channels / groups) of 8 bits, */
    const uint8_t *packed;  /* or one after the other at fewer bits */
    uint8_t bits;
    uint32_t scratch; /* where a channel's weights are unpacked to, in the arena */
    struct epilogue epilogue;
};

/* part unpacked */
/* Unpack weights: two's complement, the lowest bits first; of one bit, 0 is -1 and 1 is 1. */
static const int8_t *unpacked(const struct convolution *c, int32_t start, int32_t count)
{
    int8_t *weights = (int8_t *)&arena.bytes[c->scratch];
    const int32_t sign = (int32_t)1 << (c->bits - 1);
    uint32_t bit = (uint32_t)start * c->bits;
    for (int32_t i = 0; i < count; i++) {
        const uint8_t *at = &c->packed[bit / 8];
        const uint32_t two = at[0] | (uint32_t)at[1] << 8;
        const int32_t number = (int32_t)(two >> (bit % 8)) & (2 * sign - 1);
        weights[i] = (int8_t)(c->bits == 1 ? 2 * number - 1 : (number ^ sign) - sign);
        bit += c->bits;
    }
    return weights;
}

/* part weights_of_bytes */
static const int8_t *weights_of(const struct convolution *c, int32_t start, int32_t count)
{
    (void)count;
    return &c->weights[start];
}

/* part weights_of_bits */
static const int8_t *weights_of(const struct convolution *c, int32_t start, int32_t count)
{
    return unpacked(c, start, count);
}

/* part weights_of_both */
static const int8_t *weights_of(const struct convolution *c, int32_t start, int32_t count)
{
    if (c->weights)
        return &c->weights[start];
    return unpacked(c, start, count);
}

/* part convolution */
/* Add to the sums of `channels` outputs, 1 to 4, the products of q with their weights, which begin `taps` apart. */
static void add_products(const uint8_t *bytes, int32_t zero, const int8_t *weights, int32_t count, int32_t channels,
                         int32_t taps, int32_t *sums)
{
    if (channels == 4) {
        const int8_t *second = weights + taps, *third = second + taps, *fourth = third + taps;
        int32_t sum0 = 0, sum1 = 0, sum2 = 0, sum3 = 0;
        for (int32_t i = 0; i < count; i++) {
            const int32_t q = bytes[i] - zero;
            sum0 += q * weights[i];
            sum1 += q * second[i];
            sum2 += q * third[i];
            sum3 += q * fourth[i];
        }
        sums[0] += sum0;
        sums[1] += sum1;
        sums[2] += sum2;
        sums[3] += sum3;
        return;
    }
    for (int32_t k = 0; k < channels; k++)
        for (int32_t i = 0; i < count; i++)
            sums[k] += (bytes[i] - zero) * weights[k * taps + i];
}

/* Sum up what outputs at (y, x) see, from channel `first` of the image on. What lies outside of the image is zero. */
static void sum_window(const struct convolution *c, const int8_t *weights, int32_t channels, int32_t first, int32_t y,
                       int32_t x, int32_t *sums)
{
    const struct window *w = &c->window;
    const int32_t inputs = w->in_channels / c->groups;
    const int32_t taps = w->kernel_height * w->kernel_width * inputs;
    const int32_t column = x * w->stride_width - w->left;
    /* Neighbours in a row that are all seen lie one after the other, in the weights too. */
    const int together = inputs == w->in_channels && w->dilation_width == 1;
    const int32_t begin = column < 0 ? -column : 0;
    const int32_t end = column + w->kernel_width > w->in_width ? w->in_width - column : w->kernel_width;
    for (int32_t i = 0; i < w->kernel_height; i++) {
        const int32_t row = y * w->stride_height - w->top + i * w->dilation_height;
        const uint8_t *bytes = &arena.bytes[c->input.at];
        const int8_t *of_row = weights + i * w->kernel_width * inputs;
        if (row < 0 || row >= w->in_height)
            continue;
        bytes += row * w->in_width * w->in_channels + first;
        if (together && begin < end)
            add_products(bytes + (column + begin) * inputs, c->input.zero, of_row + begin * inputs, (end - begin) * inputs,
                         channels, taps, sums);
        for (int32_t j = 0; !together && j < w->kernel_width; j++) {
            const int32_t here = column + j * w->dilation_width;
            if (here >= 0 && here < w->in_width)
                add_products(bytes + here * w->in_channels, c->input.zero, of_row + j * inputs, inputs, channels, taps, sums);
        }
    }
}

static void convolution(const struct convolution *c)
{
    const struct window *w = &c->window;
    const int32_t inputs = w->in_channels / c->groups;
    const int32_t outputs = w->out_channels / c->groups;
    const int32_t taps = w->kernel_height * w->kernel_width * inputs;
    int32_t channels;
    for (int32_t channel = 0; channel < w->out_channels; channel += channels) {
        const int32_t left = outputs - channel % outputs; /* in this group */
        channels = left < 4 ? left : 4;
        const int8_t *weights = weights_of(c, channel * taps, channels * taps);
        for (int32_t y = 0; y < w->out_height; y++)
            for (int32_t x = 0; x < w->out_width; x++) {
                const int32_t index = (y * w->out_width + x) * w->out_channels + channel;
                int32_t sums[4] = {0, 0, 0, 0};
                sum_window(c, weights, channels, channel / outputs * inputs, y, x, sums);
                for (int32_t k = 0; k < channels; k++)
                    finish(&c->epilogue, index + k, channel + k, sums[k]);
            }
    }
}

/* part depthwise */
/* A convolution in which every output sees one channel. */
static void depthwise(const struct convolution *c)
{
    const struct window *w = &c->window;
    const int32_t outputs = w->out_channels / w->in_channels;
    const int32_t zero = c->input.zero;
    for (int32_t channel = 0; channel < w->out_channels; channel++) {
        const int32_t taps = w->kernel_height * w->kernel_width;
        const int8_t *weights = weights_of(c, channel * taps, taps);
        const uint8_t *bytes = &arena.bytes[c->input.at + (uint32_t)(channel / outputs)];
        for (int32_t y = 0; y < w->out_height; y++)
            for (int32_t x = 0; x < w->out_width; x++) {
                int32_t sum = 0;
                for (int32_t i = 0; i < w->kernel_height; i++) {
                    const int32_t row = y * w->stride_height - w->top + i * w->dilation_height;
                    if (row < 0 || row >= w->in_height)
                        continue;
                    for (int32_t j = 0; j < w->kernel_width; j++) {
                        const int32_t column = x * w->stride_width - w->left + j * w->dilation_width;
                        if (column >= 0 && column < w->in_width)
                            sum += (bytes[(row * w->in_width + column) * w->in_channels] - zero) * weights[i * w->kernel_width + j];
                    }
                }
                finish(&c->epilogue, (y * w->out_width + x) * w->out_channels + channel, channel, sum);
            }
    }
}

/* part pool_type */
struct pool {
    struct value input;
    struct window window;
    struct epilogue epilogue;
};

/* part max_pool */
static void max_pool(const struct pool *p)
{
    const struct window *w = &p->window;
    int32_t index = 0;
    for (int32_t y = 0; y < w->out_height; y++)
        for (int32_t x = 0; x < w->out_width; x++)
            for (int32_t channel = 0; channel < w->out_channels; channel++) {
                int32_t largest = INT32_MIN;
                for (int32_t i = 0; i < w->kernel_height; i++)
                    for (int32_t j = 0; j < w->kernel_width; j++) {
                        const int32_t row = y * w->stride_height - w->top + i * w->dilation_height;
                        const int32_t column = x * w->stride_width - w->left + j * w->dilation_width;
                        if (row >= 0 && row < w->in_height && column >= 0 && column < w->in_width) {
                            const int32_t number = load(&p->input, (row * w->in_width + column) * w->in_channels + channel);
                            if (number > largest)
                                largest = number;
                        }
                    }
                finish(&p->epilogue, index++, channel, largest);
            }
}

/* part sum_pool */
static void sum_pool(const struct pool *p)
{
    const struct window *w = &p->window;
    int32_t index = 0;
    for (int32_t y = 0; y < w->out_height; y++)
        for (int32_t x = 0; x < w->out_width; x++)
            for (int32_t channel = 0; channel < w->out_channels; channel++) {
                int32_t sum = 0;
                for (int32_t i = 0; i < w->kernel_height; i++)
                    for (int32_t j = 0; j < w->kernel_width; j++) {
                        const int32_t row = y * w->stride_height - w->top + i * w->dilation_height;
                        const int32_t column = x * w->stride_width - w->left + j * w->dilation_width;
                        if (row >= 0 && row < w->in_height && column >= 0 && column < w->in_width)
                            sum += load(&p->input, (row * w->in_width + column) * w->in_channels + channel);
                    }
                finish(&p->epilogue, index++, channel, sum);
            }
}

/* part average */
/* An average pooling whose divisor isn't the same everywhere. */
struct average {
    struct value input;
    int32_t in_width, channels;
    int32_t out_height, out_width;
    const int32_t *rows, *columns; /* of each output the first, and the one after the last */
    struct factors factors;        /* of each place */
    struct epilogue epilogue;
};

static void average(const struct average *a)
{
    int32_t index = 0;
    for (int32_t y = 0; y < a->out_height; y++)
        for (int32_t x = 0; x < a->out_width; x++)
            for (int32_t channel = 0; channel < a->channels; channel++) {
                int32_t sum = 0;
                for (int32_t row = a->rows[2 * y]; row < a->rows[2 * y + 1]; row++)
                    for (int32_t column = a->columns[2 * x]; column < a->columns[2 * x + 1]; column++)
                        sum += load(&a->input, (row * a->in_width + column) * a->channels + channel);
                finish(&a->epilogue, index++, channel, times(&a->factors, y * a->out_width + x, sum));
            }
}

/* part product */
/* Numbers times those of the same place and channel, of the channel alone, or of the place alone. */
struct product {
    struct value input, other;
    int32_t size, channels;
    uint8_t of_channel, of_place;
    uint8_t right; /* products are divided by 2^right, so that they fit into 32 bits */
    struct epilogue epilogue;
};

static void product(const struct product *p)
{
    for (int32_t index = 0; index < p->size; index++) {
        const int32_t channel = index % p->channels;
        const int32_t other = p->of_channel ? channel : p->of_place ? index / p->channels : index;
        int64_t number = (int64_t)load(&p->input, index) * load(&p->other, other);
        if (p->right)
            number = round_shift(number, p->right);
        finish(&p->epilogue, index, channel, number);
    }
}

/* part resize */
/* Bilinear interpolation: between two rows (or columns) each, by a weight of 30 digits. */
struct resize {
    struct value input;
    int32_t in_width, channels;
    int32_t out_height, out_width;
    const int32_t *rows, *columns; /* first, second, weight */
    uint8_t left;
    struct epilogue epilogue;
};

static int64_t between(int64_t first, int64_t second, int32_t weight)
{
    return first + round_shift((second - first) * weight, 30);
}

static int64_t between_columns(const struct resize *r, int32_t row, const int32_t *columns, int32_t channel)
{
    const int64_t first = load(&r->input, (row * r->in_width + columns[0]) * r->channels + channel);
    const int64_t second = load(&r->input, (row * r->in_width + columns[1]) * r->channels + channel);
    return between(left_shift(first, r->left), left_shift(second, r->left), columns[2]);
}

static void resize(const struct resize *r)
{
    int32_t index = 0;
    for (int32_t y = 0; y < r->out_height; y++)
        for (int32_t x = 0; x < r->out_width; x++)
            for (int32_t channel = 0; channel < r->channels; channel++) {
                const int32_t *rows = &r->rows[3 * y];
                const int32_t *columns = &r->columns[3 * x];
                const int64_t top = between_columns(r, rows[0], columns, channel);
                const int64_t bottom = between_columns(r, rows[1], columns, channel);
                finish(&r->epilogue, index++, channel, between(top, bottom, rows[2]));
            }
}

/* part move_type */
/* Some of a value's channels, which come from elsewhere unchanged. NOWHERE is real zero. */
#define NOWHERE INT32_MIN

struct piece {
    struct value input;
    int32_t first, count;                     /* channels of the output */
    const int32_t *rows, *columns, *channels; /* of the output: what they add up to is where in the input it is */
};

struct move {
    struct value output;
    int32_t height, width, channels;
    int32_t zero;
    int32_t piece_count;
    const struct piece *pieces;
};

/* part move */
static void move(const struct move *m)
{
    for (const struct piece *p = m->pieces; p < m->pieces + m->piece_count; p++)
        for (int32_t y = 0; y < m->height; y++)
            for (int32_t x = 0; x < m->width; x++)
                for (int32_t c = 0; c < p->count; c++) {
                    const int32_t row = p->rows[y], column = p->columns[x], channel = p->channels[c];
                    int32_t number = m->zero;
                    if (row != NOWHERE && column != NOWHERE && channel != NOWHERE)
                        number = load(&p->input, row + column + channel);
                    store(&m->output, (y * m->width + x) * m->channels + p->first + c, number);
                }
}

/* part scatter */
/* A move without any pattern, of a place for each number. */
struct scatter {
    struct value output;
    int32_t size;
    int32_t zero;
    int32_t input_count;
    const struct value *inputs;
    const int32_t *sizes;   /* of the inputs, which lie one behind the other, */
    const int32_t *indices; /* and each number's place in them */
};

static void scatter(const struct scatter *s)
{
    for (int32_t index = 0; index < s->size; index++) {
        int32_t from = s->indices[index];
        int32_t number = s->zero;
        if (from >= 0) {
            int32_t i = 0;
            while (from >= s->sizes[i])
                from -= s->sizes[i++];
            number = load(&s->inputs[i], from);
        }
        store(&s->output, index, number);
    }
}

/* part lookup */
/* A function of bytes: an entry for each of 256. */
struct lookup {
    struct value input;
    int32_t size;
    struct value output;
    const uint8_t *bytes; /* entries as they are stored, */
    const int32_t *words; /* or of 32 bits */
};

static void lookup(const struct lookup *l)
{
    for (int32_t index = 0; index < l->size; index++) {
        const uint8_t byte = arena.bytes[l->input.at + (uint32_t)index];
        if (l->bytes)
            arena.bytes[l->output.at + (uint32_t)index] = l->bytes[byte];
        else
            arena.words[l->output.at / 4 + (uint32_t)index] = l->words[byte];
    }
}

/* part each */
struct each {
    struct value input;
    int32_t size, channels;
    struct epilogue epilogue;
};

static void each(const struct each *s)
{
    for (int32_t index = 0; index < s->size; index++)
        finish(&s->epilogue, index, index % s->channels, load(&s->input, index));
}

/* part image */
/* An image's number x becomes round(x factor / 2^shift) between low and high, or its sign. */
struct image {
    struct value value;
    int32_t low, high;
    int32_t factor;
    int16_t shift;
    uint8_t sign;
};

typedef char floats_have_32_bits[sizeof(float) == 4 ? 1 : -1];

/* Compute with the 24 digits of a float as an integer, which needs no unit for floats and rounds alike everywhere. */
static int32_t quantized(float x, const struct image *image)
{
    uint32_t bits;
    memcpy(&bits, &x, sizeof bits);
    const int negative = bits >> 31 != 0;
    int exponent = bits >> 23 & 255;
    int64_t number = bits & 0x7fffff;
    if (exponent == 255 && number != 0)
        return 0; /* not a number */
    if (exponent > 0)
        number += 0x800000;
    else
        exponent = 1;
    number *= negative ? -(int64_t)image->factor : image->factor;
    if (image->sign)
        return number >= 0 ? 1 : -1;
    const int shift = image->shift + 150 - exponent;
    if (shift > 60)
        number = 0;
    else if (shift >= 22)
        number = round_shift(number, shift);
    if (number < image->low)
        return image->low;
    if (number > image->high)
        return image->high;
    return (int32_t)number;
}
