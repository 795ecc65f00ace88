/*
 * hw_breakpoint_enabled() without a request: reads the status page of hwbpd.
 *
 * May a hardware breakpoint of the host be installed here, for this thread, at its next instruction? For whoever is
 * about to enter a guest and wants to know whether the host's debug registers have to be put away. docs/status-page.md
 * says what the page holds; this header is all of the client, in C11, for Linux.
 *
 *	struct hwbp_page page;
 *	if (hwbp_page_open(&page, "/run/hwbpd/hwbpd.sock.page") == 0 &&
 *	    hwbp_page_enabled(&page, cpu, NULL, hwbp_now_s()) == HWBP_NONE)
 *		... nothing of hwbpd's is there ...
 *
 * Rules of use:
 *
 * - only HWBP_NONE means no. HWBP_UNKNOWN (the daemon does not run, is stuck, or does not know the thread) is to be
 *   taken for yes by whoever must not miss one;
 * - the answer is about the CPU that was named. The caller is pinned there, or not moved until it has used the answer;
 * - open once. The page stays right when the daemon is started anew; a thread then has to be registered again;
 * - none of the functions but open and close calls the kernel or waits, and any number of threads may call them.
 *
 * Compile with -std=gnu11, or define _GNU_SOURCE before the first #include.
 *
 * A word is loaded whole and says what it says by itself, so nothing has to be loaded twice. The loads are acquire
 * loads: an answer is not older than what the caller knew when it asked, on arm64 as on x86.
 */
#ifndef HWBP_PAGE_H
#define HWBP_PAGE_H

#include <errno.h>
#include <fcntl.h>
#include <stddef.h>
#include <stdint.h>
#include <stdatomic.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/stat.h>
#include <time.h>
#include <unistd.h>

#ifndef CLOCK_MONOTONIC_COARSE
#error "hwbp_page.h: compile with -std=gnu11, or define _GNU_SOURCE before the first #include"
#endif

/* The layout. *_AT are indices of 64-bit words. */
#define HWBP_PAGE_LAYOUT 1u
#define HWBP_PAGE_MAGIC_AT 0
#define HWBP_PAGE_LAYOUT_AT 1
#define HWBP_PAGE_BYTES_AT 2
#define HWBP_PAGE_CPUS_FROM_AT 3
#define HWBP_PAGE_CPUS_AT 4
#define HWBP_PAGE_THREADS_FROM_AT 5
#define HWBP_PAGE_THREADS_AT 6
#define HWBP_PAGE_EPOCH_AT 8
#define HWBP_PAGE_VALID_UNTIL_S_AT 9
#define HWBP_PAGE_EVERYWHERE_AT 10
#define HWBP_PAGE_CHANGES_AT 11
#define HWBP_PAGE_KGDB_AT 13
#define HWBP_PAGE_HEADER_BYTES 4096u
#define HWBP_PAGE_ARMED_MASK 0xffffu
#define HWBP_PAGE_REGISTRATION_SHIFT 32
#define HWBP_PAGE_VALID_S 3

enum hwbp_answer {
	HWBP_NONE = 0,	  /* none of hwbpd's; others may have some outside it */
	HWBP_YES = 1,
	HWBP_UNKNOWN = 2,
};

struct hwbp_page {
	const _Atomic uint64_t *words;
	const _Atomic uint64_t *cpus;
	const _Atomic uint64_t *threads;
	uint64_t cpu_count;
	uint64_t thread_count;
	size_t bytes;
};

/* A thread's word: what the daemon replied to the request "thread" (docs/protocol.md). */
struct hwbp_thread {
	uint64_t index;
	uint64_t registration;
};

static inline uint64_t hwbp_load(const _Atomic uint64_t *word)
{
	return atomic_load_explicit(word, memory_order_acquire);
}

/* CLOCK_MONOTONIC in whole seconds, for hwbp_page_enabled(). A caller who has the time already passes that. */
static inline int64_t hwbp_now_s(void)
{
	struct timespec now;

	/* Up to a few milliseconds behind, which is nothing here, and cheaper: it does not read the counter. */
	clock_gettime(CLOCK_MONOTONIC_COARSE, &now);
	return (int64_t)now.tv_sec;
}

static inline void hwbp_page_close(struct hwbp_page *page)
{
	if (page->words)
		munmap((void *)(uintptr_t)page->words, page->bytes);
	memset(page, 0, sizeof(*page));
}

/*
 * Maps the page of a daemon: the path of its socket with ".page" behind it.
 *
 * Returns 0; -ENOENT, -EACCES or another errno of the system; -EPROTO for a file that is no page or has another layout;
 * -ESTALE for one of before this host was started, which no daemon has written since.
 */
static inline int hwbp_page_open(struct hwbp_page *page, const char *path)
{
	uint64_t cpus_from, threads_from, words;
	struct stat status;
	void *mapped;
	int fd;

	memset(page, 0, sizeof(*page));
	fd = open(path, O_RDONLY | O_CLOEXEC);
	if (fd < 0)
		return -errno;
	if (fstat(fd, &status) < 0) {
		int error = errno;

		close(fd);
		return -error;
	}
	if (status.st_size < (off_t)HWBP_PAGE_HEADER_BYTES) {
		close(fd);
		return -EPROTO;
	}
	page->bytes = (size_t)status.st_size;
	mapped = mmap(NULL, page->bytes, PROT_READ, MAP_SHARED, fd, 0);
	if (mapped == MAP_FAILED) {
		int error = errno;

		close(fd);
		return -error;
	}
	close(fd);
	page->words = (const _Atomic uint64_t *)mapped;

	words = page->bytes / 8;
	cpus_from = hwbp_load(&page->words[HWBP_PAGE_CPUS_FROM_AT]);
	threads_from = hwbp_load(&page->words[HWBP_PAGE_THREADS_FROM_AT]);
	page->cpu_count = hwbp_load(&page->words[HWBP_PAGE_CPUS_AT]);
	page->thread_count = hwbp_load(&page->words[HWBP_PAGE_THREADS_AT]);
	if (memcmp(mapped, "hwbpage", 8) != 0 || hwbp_load(&page->words[HWBP_PAGE_LAYOUT_AT]) != HWBP_PAGE_LAYOUT ||
	    cpus_from > words || page->cpu_count > words - cpus_from ||
	    threads_from > words || page->thread_count > words - threads_from) {
		hwbp_page_close(page);
		return -EPROTO;
	}
	if ((int64_t)hwbp_load(&page->words[HWBP_PAGE_VALID_UNTIL_S_AT]) > hwbp_now_s() + 1 + HWBP_PAGE_VALID_S) {
		hwbp_page_close(page);
		return -ESTALE;
	}
	page->cpus = page->words + cpus_from;
	page->threads = page->words + threads_from;
	return 0;
}

/* Whether a daemon keeps the page up to date. */
static inline int hwbp_page_is_valid(const struct hwbp_page *page, int64_t now_s)
{
	return now_s < (int64_t)hwbp_load(&page->words[HWBP_PAGE_VALID_UNTIL_S_AT]);
}

/*
 * May a breakpoint be installed on that CPU, for that thread?
 *
 * thread: the caller's word, or NULL for the CPU alone, whatever runs there. now_s: from hwbp_now_s().
 * A CPU or a word that the page does not have is HWBP_UNKNOWN, and so is a registration that is over.
 */
static inline enum hwbp_answer hwbp_page_enabled(const struct hwbp_page *page, unsigned int cpu,
						 const struct hwbp_thread *thread, int64_t now_s)
{
	uint64_t counts;

	if (cpu >= page->cpu_count)
		return HWBP_UNKNOWN;
	counts = hwbp_load(&page->words[HWBP_PAGE_EVERYWHERE_AT]) | hwbp_load(&page->cpus[cpu]);
	if (thread) {
		uint64_t word;

		if (thread->index >= page->thread_count)
			return HWBP_UNKNOWN;
		word = hwbp_load(&page->threads[thread->index]);
		if (word >> HWBP_PAGE_REGISTRATION_SHIFT != thread->registration)
			return HWBP_UNKNOWN;
		counts |= word;
	}
	if (!hwbp_page_is_valid(page, now_s))
		return HWBP_UNKNOWN;
	return counts & HWBP_PAGE_ARMED_MASK ? HWBP_YES : HWBP_NONE;
}

#endif
