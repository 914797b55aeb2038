#pragma once

#define MMVQ_MAX_BATCH_SIZE 8
