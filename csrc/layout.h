// Where in a slot the bytes of extents go: aligned covers, one after another.
#pragma once

#include <cstdint>
#include <string>
#include <vector>

namespace mhaffn {

// Bytes [offset, offset + length) of a file.
struct Extent {
  std::string path;
  uint64_t offset = 0;
  uint64_t length = 0;
};

// A run of a file that holds whole extents: starts at a page, `length` is whole pages and may pass the end of
// the file, `need` is what the extents ask for.
struct Cover {
  std::string path;
  uint64_t offset = 0;
  uint64_t length = 0;
  uint64_t need = 0;
  uint64_t position = 0;  // in the slot, from where the request starts
};

// Where everything goes: covers one after another, extents that touch or share a page in one cover.
struct Layout {
  std::vector<Cover> covers;
  std::vector<uint64_t> placements;  // of each extent, from where the request starts
  uint64_t cover_bytes = 0;
  uint64_t extent_bytes = 0;
};

// Throws std::invalid_argument for extents that pass the range of file offsets, one or all of them.
Layout lay_out(const std::vector<Extent>& extents);

}  // namespace mhaffn
