/* Threads that answer a doorbell: experts of one layer, computed for one token.
 *
 * Work is claimed, not dealt out: a thread that sleeps, or that the system has taken its core from,
 * keeps nobody waiting unless it has a block of rows in its hands. All of the state is one word:
 *
 *     claims   ring, 30 bits | phase, 2 bits | blocks there are, 16 bits | blocks claimed, 16 bits
 *
 *     IDLE --bell--> OPENING --order read--> UP --all its blocks done--> DOWN --all done--> IDLE
 *
 * Whoever finishes the last block of a phase opens the next one, and at the end writes the answer's
 * bell. A claim says with the word that it came from what it is for, so late claims are harmless. */

#define _GNU_SOURCE
#include "experts.h"

#include <pthread.h>
#include <sched.h>
#include <stdatomic.h>
#include <stdlib.h>
#include <time.h>
#if defined(__linux__)
#include <sys/prctl.h>
#endif

enum { IDLE, OPENING, UP, DOWN };
#define PARTS 8
#define MOST_BLOCKS 0xFFFF
#define PHASE(claims) ((claims) >> 32 & 3)
#define BLOCKS(claims) ((claims) >> 16 & 0xFFFF)
#define CLAIMED(claims) ((claims) & 0xFFFF)
#define CLAIMS(ring, phase, blocks) ((uint64_t)(ring) << 34 | (uint64_t)(phase) << 32 | (blocks) << 16)

/* Where things are in the memory that asker and threads share; bytes. */
struct doorbell {
  int64_t bell, order, x, answer, done;
};

struct layout {
  struct doorbell doorbell;
  int64_t layers, experts, top_k;
  int64_t strides[PARTS]; /* of an expert, for each part */
};

struct counts {
  int64_t rings, experts, nanoseconds, refused;
};

struct worker {
  pthread_t thread;
  struct service *service;
  int64_t cpu; /* -1: any */
  struct prepared vector;
};

struct service {
  _Alignas(64) _Atomic uint64_t claims;
  _Alignas(64) _Atomic int64_t finished; /* blocks of this phase */
  _Alignas(64) _Atomic int stopping;
  _Atomic int asleep; /* threads that wait to be woken */
  _Atomic int64_t awake_until;
  int64_t spin;
  pthread_mutex_t lock;
  pthread_cond_t woken;
  struct layout layout;
  uint8_t *memory;
  const uint64_t *bases; /* [layers, PARTS] */
  /* The order under way: written while OPENING, read by those who hold a claim. */
  _Alignas(64) int32_t bell;
  int64_t layer, count, rows_of_block, started;
  int32_t *ids;
  uint16_t *h; /* [top_k, WIDTH] */
  _Atomic int64_t rings, experts, nanoseconds, refused;
  int64_t num_workers;
  struct worker *workers;
  uint64_t number;
};

static int64_t now(void) {
  struct timespec time;
  clock_gettime(CLOCK_MONOTONIC, &time);
  return (int64_t)time.tv_sec * 1000000000 + time.tv_nsec;
}

static void relax(void) {
#if defined(__x86_64__)
  _mm_pause();
#elif defined(__aarch64__)
  __asm__ volatile("yield");
#endif
}

/* Gradual underflow and rounding to nearest in this thread; returns what was set before. */
static unsigned exact_arithmetic(void) {
#if defined(__x86_64__)
  unsigned before = _mm_getcsr();
  _mm_setcsr(0x1F80);
  return before;
#else
  return 0;
#endif
}

static void restore_arithmetic(unsigned before) {
#if defined(__x86_64__)
  _mm_setcsr(before);
#else
  (void)before;
#endif
}

static _Atomic int32_t *word_at(struct service *s, int64_t offset) {
  return (_Atomic int32_t *)(s->memory + offset);
}

static struct matrix matrix_of(const struct service *s, int expert, int first_part) {
  const uint64_t *bases = s->bases + s->layer * PARTS + first_part;
  const int64_t *strides = s->layout.strides + first_part;
  return (struct matrix){
      .codes = (const uint8_t *)bases[0] + strides[0] * expert,
      .scales = (const uint8_t *)bases[1] + strides[1] * expert,
      .extra = (const uint8_t *)bases[2] + strides[2] * expert,
      .bias = (const uint16_t *)((const uint8_t *)bases[3] + strides[3] * expert),
  };
}

/* Let rows be claimed, of `rows` in all. */
static void open_phase(struct service *s, uint64_t ring, int phase, int64_t rows) {
  int64_t block = rows / (8 * (s->num_workers + 1));
  block = (block < 8 ? 8 : block > 64 ? 64 : block) / 8 * 8;
  while (rows > block * MOST_BLOCKS) block *= 2;
  s->rows_of_block = block;
  atomic_store_explicit(&s->finished, 0, memory_order_relaxed);
  uint64_t blocks = (uint64_t)((rows + block - 1) / block);
  atomic_store_explicit(&s->claims, CLAIMS(ring, phase, blocks), memory_order_release);
}

static void answer(struct service *s, uint64_t ring) {
  atomic_fetch_add(&s->rings, 1);
  atomic_fetch_add(&s->experts, s->count);
  atomic_fetch_add(&s->nanoseconds, now() - s->started);
  /* The bell first: who finds the phase IDLE must not take this ring for a new one. */
  atomic_store_explicit(word_at(s, s->layout.doorbell.done), s->bell, memory_order_release);
  atomic_store_explicit(&s->claims, CLAIMS(ring + 1, IDLE, 0ull), memory_order_release);
}

/* Read the order behind a bell, if nobody else does. */
static void open_ring(struct service *s, uint64_t claims, int32_t bell) {
  const uint64_t ring = claims >> 34;
  if (!atomic_compare_exchange_strong(&s->claims, &claims, CLAIMS(ring, OPENING, 0ull))) return;
  const int32_t *order = (const int32_t *)(s->memory + s->layout.doorbell.order);
  s->bell = bell;
  s->started = now();
  s->layer = order[0];
  s->count = order[1];
  int is_good = s->layer >= 0 && s->layer < s->layout.layers && s->count >= 0 &&
                s->count <= s->layout.top_k;
  for (int64_t i = 0; is_good && i < s->count; i++) {
    s->ids[i] = order[2 + i];
    is_good = s->ids[i] >= 0 && s->ids[i] < s->layout.experts;
  }
  if (!is_good) {
    atomic_fetch_add(&s->refused, 1);
    s->count = 0;
  }
  if (s->count)
    open_phase(s, ring, UP, s->count * WIDTH);
  else
    answer(s, ring);
}

/* Whether a thread has this vector ready. If not, it is about to. */
static int is_ready(const struct service *s, struct prepared *vector, uint64_t product) {
  const uint64_t order = (uint64_t)atomic_load_explicit(&s->rings, memory_order_relaxed);
  if (vector->service == s->number && vector->order == order && vector->product == product) return 1;
  vector->service = s->number, vector->order = order, vector->product = product;
  return 0;
}

/* Rows from `first` on, which run through the experts one after the other. */
static void run_block(struct service *s, struct prepared *vector, int phase, int64_t first) {
  const int64_t rows = phase == UP ? WIDTH : HIDDEN;
  int64_t last = first + s->rows_of_block;
  last = last < rows * s->count ? last : rows * s->count;
  const uint16_t *x = (const uint16_t *)(s->memory + s->layout.doorbell.x);
  float *y = (float *)(s->memory + s->layout.doorbell.answer);
  while (first < last) {
    const int64_t i = first / rows, end = last < (i + 1) * rows ? last : (i + 1) * rows;
    struct matrix m = matrix_of(s, s->ids[i], phase == UP ? 0 : PARTS / 2);
    uint16_t *h = s->h + i * WIDTH;
    if (phase == UP) {
      /* packed experts have a factor of their own */
      if (!is_ready(s, vector, KIND == PACKED ? 2 * (uint64_t)i : 0)) prepare_up(m, x, vector);
      gate_up_span(m, x, vector, h, first - i * rows, end - i * rows);
    } else {
      if (!is_ready(s, vector, 2 * (uint64_t)i + 1)) prepare_down(m, h, vector);
      down_span(m, h, vector, y + i * HIDDEN, first - i * rows, end - i * rows);
    }
    first = end;
  }
}

/* Claim a block and run it. Returns whether there was one. */
static int work_once(struct service *s, struct prepared *vector) {
  uint64_t claims = atomic_load_explicit(&s->claims, memory_order_acquire);
  if (CLAIMED(claims) >= BLOCKS(claims)) return 0;
  do {
    if (CLAIMED(claims) >= BLOCKS(claims)) return 0;
  } while (!atomic_compare_exchange_weak_explicit(&s->claims, &claims, claims + 1,
                                                  memory_order_acq_rel, memory_order_acquire));
  const int phase = PHASE(claims);
  run_block(s, vector, phase, (int64_t)CLAIMED(claims) * s->rows_of_block);
  const int64_t blocks = (int64_t)BLOCKS(claims);
  if (atomic_fetch_add_explicit(&s->finished, 1, memory_order_acq_rel) + 1 == blocks) {
    if (phase == UP)
      open_phase(s, claims >> 34, DOWN, s->count * HIDDEN);
    else
      answer(s, claims >> 34);
  }
  return 1;
}

/* Do what there is to do. Returns whether a ring is under way. */
static int work(struct service *s, struct prepared *vector) {
  if (work_once(s, vector)) return 1;
  uint64_t claims = atomic_load_explicit(&s->claims, memory_order_acquire);
  if (PHASE(claims) != IDLE) return 1;
  const int32_t done = atomic_load_explicit(word_at(s, s->layout.doorbell.done), memory_order_acquire);
  const int32_t bell = atomic_load_explicit(word_at(s, s->layout.doorbell.bell), memory_order_acquire);
  if (bell == done) return 0;
  open_ring(s, claims, bell);
  return 1;
}

/* Sleep until somebody wakes the threads; a bell that was rung without is heard in 20 ms. */
static void sleep_a_while(struct service *s) {
  struct timespec until;
  clock_gettime(CLOCK_MONOTONIC, &until);
  until.tv_nsec += 20000000;
  if (until.tv_nsec >= 1000000000) until.tv_sec++, until.tv_nsec -= 1000000000;
  pthread_mutex_lock(&s->lock);
  atomic_fetch_add(&s->asleep, 1);
  if (!atomic_load(&s->stopping) && now() >= atomic_load(&s->awake_until))
    pthread_cond_timedwait(&s->woken, &s->lock, &until);
  atomic_fetch_sub(&s->asleep, 1);
  pthread_mutex_unlock(&s->lock);
}

/* Spin for a while after the last work, and as long as work is announced; then sleep. */
static void back_off(struct service *s, int64_t idle) {
  if (idle < s->spin || now() < atomic_load_explicit(&s->awake_until, memory_order_relaxed)) {
    for (int i = 0; i < 16; i++) relax();
  } else {
    sleep_a_while(s);
  }
}

/* Announce work for so many nanoseconds from now on; 0: there is none, and the threads may sleep. */
void service_wake(struct service *s, int64_t nanoseconds) {
  atomic_store(&s->awake_until, nanoseconds ? now() + nanoseconds : 0);
  if (nanoseconds && atomic_load(&s->asleep)) {
    pthread_mutex_lock(&s->lock);
    pthread_cond_broadcast(&s->woken);
    pthread_mutex_unlock(&s->lock);
  }
}

static void *serve(void *given) {
  struct worker *worker = given;
  struct service *s = worker->service;
  exact_arithmetic();
#if defined(__linux__)
  prctl(PR_SET_NAME, "experts", 0, 0, 0);
  prctl(PR_SET_TIMERSLACK, 1000, 0, 0, 0);
  if (worker->cpu >= 0) {
    cpu_set_t cpus;
    CPU_ZERO(&cpus);
    CPU_SET((size_t)worker->cpu, &cpus);
    pthread_setaffinity_np(pthread_self(), sizeof cpus, &cpus); /* else it runs where it may */
  }
#endif
  int64_t last = now();
  while (!atomic_load_explicit(&s->stopping, memory_order_relaxed)) {
    if (work(s, &worker->vector)) {
      relax();
      last = 0;
    } else {
      if (last == 0) last = now();
      back_off(s, now() - last);
    }
  }
  return NULL;
}

void *service_open(const struct layout *layout, void *memory, const uint64_t *bases) {
  struct service *s = aligned_alloc(64, (sizeof *s + 63) / 64 * 64);
  if (s == NULL) return NULL;
  memset(s, 0, sizeof *s);
  s->layout = *layout;
  s->memory = memory;
  s->bases = bases;
#if IN_PAIRS
  if (!pairs_are_sums) pairs_are_sums = pairs_in_order();
#endif
  static _Atomic uint64_t opened;
  s->number = atomic_fetch_add(&opened, 1) + 1;
  pthread_mutex_init(&s->lock, NULL);
  pthread_condattr_t monotonic;
  pthread_condattr_init(&monotonic);
#if defined(__linux__)
  pthread_condattr_setclock(&monotonic, CLOCK_MONOTONIC);
#endif
  pthread_cond_init(&s->woken, &monotonic);
  s->ids = calloc((size_t)layout->top_k, sizeof *s->ids);
  s->h = aligned_alloc(64, ((size_t)layout->top_k * WIDTH * sizeof *s->h + 63) / 64 * 64);
  if (s->ids != NULL && s->h != NULL) return s;
  free(s->ids), free(s->h), free(s);
  return NULL;
}

/* Start threads on these cores. Returns how many there are. */
int64_t service_start(struct service *s, int64_t threads, const int64_t *cpus, int64_t spin) {
  s->spin = spin;
  s->workers = aligned_alloc(64, (size_t)(threads ? threads : 1) * sizeof *s->workers);
  for (int64_t i = 0; s->workers != NULL && i < threads; i++) {
    struct worker *worker = s->workers + s->num_workers;
    worker->service = s;
    worker->cpu = cpus[i];
    worker->vector.service = 0;
    if (pthread_create(&worker->thread, NULL, serve, worker)) break;
    s->num_workers++;
  }
  return s->num_workers;
}

void service_close(struct service *s) {
  atomic_store(&s->stopping, 1);
  pthread_mutex_lock(&s->lock);
  pthread_cond_broadcast(&s->woken);
  pthread_mutex_unlock(&s->lock);
  for (int64_t i = 0; i < s->num_workers; i++) pthread_join(s->workers[i].thread, NULL);
  free(s->workers), free(s->ids), free(s->h), free(s);
}

void service_counts(const struct service *s, struct counts *into) {
  *into = (struct counts){s->rings, s->experts, s->nanoseconds, s->refused};
}

/* Take part in the rings that are under way, until none is. */
void service_help(void *given) {
  struct service *s = given;
  static _Thread_local struct prepared vector;
  const unsigned before = exact_arithmetic();
  while (work(s, &vector)) relax();
  restore_arithmetic(before);
}

/* As OpenMP's library runs a function in threads of a team: `GOMP_parallel`. */
typedef void (*team)(void (*function)(void *), void *given, unsigned threads, unsigned flags);

/* Ring for experts of a layer, with x bfloat16 [HIDDEN] (NULL: what is there), and wait for the
 * answer. helpers: so many threads of a team help, or without a team this one, if it is not 0.
 * Returns 0 if there was no answer in so many nanoseconds. */
int service_ask(struct service *s, int64_t layer, int64_t count, const int32_t *ids,
                const uint16_t *x, team run, int64_t helpers, int64_t patience) {
  int32_t *order = (int32_t *)(s->memory + s->layout.doorbell.order);
  order[0] = (int32_t)layer, order[1] = (int32_t)count;
  memcpy(order + 2, ids, (size_t)count * sizeof *ids);
  if (x != NULL) memcpy(s->memory + s->layout.doorbell.x, x, HIDDEN * sizeof *x);
  _Atomic int32_t *bell = word_at(s, s->layout.doorbell.bell);
  const int32_t value = (int32_t)((uint32_t)atomic_load(bell) + 1);
  atomic_store_explicit(bell, value, memory_order_release);
  const int64_t end = now() + patience;
  if (s->num_workers && now() >= atomic_load(&s->awake_until)) service_wake(s, s->spin + 1);
  if (run != NULL) run(service_help, s, (unsigned)helpers, 0);
  while (atomic_load_explicit(word_at(s, s->layout.doorbell.done), memory_order_acquire) != value) {
    if (helpers) service_help(s);
    relax();
    if (now() > end) return 0;
  }
  return 1;
}
