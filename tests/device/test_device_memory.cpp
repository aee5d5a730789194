// SPDX-License-Identifier: Apache-2.0
// What the other suites rely on when they run on a device: memory is as its test says, and what is written beside it is
// found.
#include <stdlib.h>
#include <string.h>

#include "emulated_rig.h"

static const std::vector<int> numbers = {3, 1, 4, 1, 5};

START_TEST(values_come_back_as_they_were_put) {
    begin(1);
    simt::Buffer<int> full("full", numbers), part("part", 5);
    const int         two[] = {8, 9};
    part.put(1, two, 2);
    full.set({2, 7});
    ck_assert((full.values() == std::vector<int>{2, 7, 4, 1, 5}));
    ck_assert((part.values() == std::vector<int>{-1, 8, 9, -1, -1})); // undefined memory has all bits set
    simt::Buffer<int> none("none", 0);
    ck_assert(none.values().empty());
    expect_clean();
}
END_TEST

static void write_around(simt::Buffer<int> *buffer, ptrdiff_t at) {
    ck_assert_int_eq(cudaMemset((unsigned char *)buffer->data() + at, 0, 1), cudaSuccess);
}

// Tools object to what the next two cases do on purpose.
static bool under_a_tool() {
    const char *guards = getenv("KVQ_DEVICE_GUARDS");
    return guards != NULL && strcmp(guards, "no") == 0;
}

// The guards are put right again, so that nothing is found about the case itself.
START_TEST(writes_beside_a_buffer_are_found) {
    static const ptrdiff_t   PLACES[] = {-1, -200, 20, 275};
    static const char *const TEXTS[] = {"1 bytes before numbers", "200 bytes before numbers",
                                        "1 bytes behind the end of numbers", "256 bytes behind the end of numbers"};
    if (under_a_tool()) return;
    begin(1);
    simt::Buffer<int> buffer("numbers", numbers), other("other", numbers);
    write_around(&buffer, PLACES[_i]);
    ck_assert_uint_eq(simt::reports().size(), 1);
    ck_assert_msg(strstr(simt::report_text().c_str(), TEXTS[_i]) != NULL, "%s", simt::report_text().c_str());
    ck_assert_int_eq(cudaMemset((unsigned char *)buffer.data() + PLACES[_i], simt::GUARD, 1), cudaSuccess);
    begin(1);
    expect_clean();
}
END_TEST

START_TEST(errors_of_the_device_are_found) {
    if (under_a_tool()) return;
    begin(1);
    simt::Buffer<int> buffer("numbers", numbers);
    ck_assert(simt::reports().empty());
    (void)cudaMemcpy(buffer.data(), numbers.data(), 4, (cudaMemcpyKind)77);
    ck_assert_uint_eq(simt::reports().size(), 1);
    begin(1);
    expect_clean(); // that one does not last
}
END_TEST

static const kvq_test_case cases[] = {
    KVQ_CASE(values_come_back_as_they_were_put),
    KVQ_LOOP(writes_beside_a_buffer_are_found, 4),
    KVQ_CASE(errors_of_the_device_are_found),
};
KVQ_TEST_MAIN("test_device_memory", cases)
