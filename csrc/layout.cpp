#include "layout.h"

#include <algorithm>
#include <stdexcept>
#include <unordered_map>

#include "mapping.h"

namespace mhaffn {

Layout lay_out(const std::vector<Extent>& extents) {
  constexpr uint64_t kEnd = INT64_MAX - kPageBytes;
  constexpr const char* kTooMuch = "the extents of one request add up past the range of file offsets";
  Layout layout;
  layout.placements.resize(extents.size());
  std::vector<std::string> paths;
  std::unordered_map<std::string, std::vector<size_t>> by_path;
  for (size_t i = 0; i < extents.size(); ++i) {
    const Extent& extent = extents[i];
    if (extent.offset > kEnd || extent.length > kEnd - extent.offset) {
      throw std::invalid_argument(extent.path + ": bytes " + std::to_string(extent.offset) + " + " +
                                  std::to_string(extent.length) + " pass the range of file offsets");
    }
    if (extent.path.find('\0') != std::string::npos) throw std::invalid_argument("a path holds a null byte");
    if (layout.extent_bytes > kEnd - extent.length) throw std::invalid_argument(kTooMuch);
    layout.extent_bytes += extent.length;
    if (extent.length == 0) continue;
    auto& indices = by_path[extent.path];
    if (indices.empty()) paths.push_back(extent.path);
    indices.push_back(i);
  }
  for (const std::string& path : paths) {
    auto& indices = by_path[path];
    std::stable_sort(indices.begin(), indices.end(),
                     [&](size_t a, size_t b) { return extents[a].offset < extents[b].offset; });
    const size_t first = layout.covers.size();
    for (size_t i : indices) {
      const uint64_t begin = extents[i].offset / kPageBytes * kPageBytes;
      const uint64_t end = extents[i].offset + extents[i].length;
      const bool joins =
          layout.covers.size() > first && begin <= layout.covers.back().offset + layout.covers.back().length;
      if (!joins) layout.covers.push_back({path, begin, 0, 0, layout.cover_bytes});
      Cover& cover = layout.covers.back();
      cover.need = std::max(cover.need, end - cover.offset);
      cover.length = round_up(cover.need, kPageBytes);
      if (cover.position > kEnd - cover.length) throw std::invalid_argument(kTooMuch);
      layout.cover_bytes = cover.position + cover.length;
      layout.placements[i] = cover.position + (extents[i].offset - cover.offset);
    }
  }
  return layout;
}

}  // namespace mhaffn
