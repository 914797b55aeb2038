#pragma once

// What ggml-vulkan.cpp takes from headers newer than Vulkan 1.3.272, so that it compiles with those of Debian 12
// (1.3.239). It uses them in builds with GGML_VULKAN_VALIDATE only.

#include <vulkan/vulkan.hpp>

#include <cstdint>
#include <vector>

#ifndef VK_EXT_layer_settings
namespace vk {

enum class LayerSettingTypeEXT { eBool32 = 0 };

struct LayerSettingEXT {
    const char        * pLayerName;
    const char        * pSettingName;
    LayerSettingTypeEXT type;
    uint32_t            valueCount;
    const void        * pValues;
};

struct LayerSettingsCreateInfoEXT {
    VkStructureType         sType = (VkStructureType) 1000496000;
    const void            * pNext = nullptr;
    uint32_t                settingCount;
    const LayerSettingEXT * pSettings;

    explicit LayerSettingsCreateInfoEXT(const std::vector<LayerSettingEXT> & settings)
        : settingCount((uint32_t) settings.size()), pSettings(settings.data()) {}

    // ggml puts the address into a chain of structures, where an older validation layer takes it for an error.
    const void * operator&() const { return nullptr; }
};

} // namespace vk
#endif
