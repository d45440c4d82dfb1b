// The chip libraries that are loaded.
#include <mutex>
#include <vector>

#include "../kernels/chip.h"

static std::mutex mutex;
static std::vector<const nvfp4::Chip*> chips;

void nvfp4_register_chip(const nvfp4::Chip* chip) {
  const std::lock_guard lock(mutex);
  chips.push_back(chip);
}

const nvfp4::Chip* nvfp4_chip_for(int major) {
  const std::lock_guard lock(mutex);
  for (const nvfp4::Chip* chip : chips)
    if (chip->major == major) return chip;
  return nullptr;
}
