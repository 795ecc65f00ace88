/* Reads a status page as tests/clients/test_c_page.py tells it to: one answer on each line for each question. */
#include <inttypes.h>
#include <stdio.h>
#include <stdlib.h>

#include "hwbp_page.h"

static void layout(void)
{
	printf("MAGIC_AT %d\nLAYOUT_AT %d\nBYTES_AT %d\nCPUS_FROM_AT %d\nCPUS_AT %d\nTHREADS_FROM_AT %d\nTHREADS_AT %d\n",
	       HWBP_PAGE_MAGIC_AT, HWBP_PAGE_LAYOUT_AT, HWBP_PAGE_BYTES_AT, HWBP_PAGE_CPUS_FROM_AT, HWBP_PAGE_CPUS_AT,
	       HWBP_PAGE_THREADS_FROM_AT, HWBP_PAGE_THREADS_AT);
	printf("EPOCH_AT %d\nVALID_UNTIL_S_AT %d\nEVERYWHERE_AT %d\nCHANGES_AT %d\nKGDB_AT %d\n", HWBP_PAGE_EPOCH_AT,
	       HWBP_PAGE_VALID_UNTIL_S_AT, HWBP_PAGE_EVERYWHERE_AT, HWBP_PAGE_CHANGES_AT, HWBP_PAGE_KGDB_AT);
	printf("LAYOUT %u\nARMED_MASK %u\nREGISTRATION_SHIFT %d\nVALID_S %d\nHEADER_BYTES %u\n", HWBP_PAGE_LAYOUT,
	       HWBP_PAGE_ARMED_MASK, HWBP_PAGE_REGISTRATION_SHIFT, HWBP_PAGE_VALID_S, HWBP_PAGE_HEADER_BYTES);
	printf("NONE %d\nYES %d\nUNKNOWN %d\n", HWBP_NONE, HWBP_YES, HWBP_UNKNOWN);
}

static int64_t now_ns(void)
{
	struct timespec now;

	clock_gettime(CLOCK_MONOTONIC, &now);
	return now.tv_sec * INT64_C(1000000000) + now.tv_nsec;
}

/* Nanoseconds for an answer: the caller has the time, and the caller asks for it each time. */
static void speed(const struct hwbp_page *page, const struct hwbp_thread *thread)
{
	enum { READS = 2000000 };
	volatile int64_t time_s = hwbp_now_s();
	volatile int sink;
	int64_t start = now_ns(), middle;

	for (int i = 0; i < READS; i++)
		sink = hwbp_page_enabled(page, 0, thread, time_s);
	middle = now_ns();
	for (int i = 0; i < READS; i++)
		sink = hwbp_page_enabled(page, 0, thread, hwbp_now_s());
	(void)sink;
	printf("%f %f\n", (double)(middle - start) / READS, (double)(now_ns() - middle) / READS);
}

/* layout | PATH: then for each line "CPU INDEX REGISTRATION", INDEX -1 for no thread, the answer; "speed I R". */
int main(int argc, char **argv)
{
	struct hwbp_page page;
	char line[256];
	int error;

	setvbuf(stdout, NULL, _IOLBF, 0);
	if (argc < 2) {
		layout();
		return 0;
	}
	error = hwbp_page_open(&page, argv[1]);
	printf("%d\n", error);
	if (error)
		return 0;
	while (fgets(line, sizeof(line), stdin)) {
		struct hwbp_thread thread;
		long long index;
		unsigned int cpu;

		if (sscanf(line, "speed %" SCNu64 " %" SCNu64, &thread.index, &thread.registration) == 2) {
			speed(&page, &thread);
			continue;
		}
		if (sscanf(line, "%u %lld %" SCNu64, &cpu, &index, &thread.registration) != 3)
			return 1;
		thread.index = (uint64_t)index;
		printf("%d\n", hwbp_page_enabled(&page, cpu, index < 0 ? NULL : &thread, hwbp_now_s()));
	}
	hwbp_page_close(&page);
	return 0;
}
