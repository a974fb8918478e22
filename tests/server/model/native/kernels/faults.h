// Has requests for memory and for threads fail.
#pragma once

void fail_after(int num_requests, int num_failing);  // so many requests succeed, and then so many fail
void pause_failing();
bool fail_no_more();  // whether any has failed
