-- With what chance a heartbeat refreshes the TTLs: the time since the one before, in parts of 15 minutes. So they are
-- refreshed about once in 15 minutes, however often the heartbeats come, always after a longer silence, and without
-- asking a key for its TTL. Keys outlive their connections by a day: that all heartbeats of one miss is less likely
-- than e^-92.
local function refresh_chance(silence_ms)
  return silence_ms / 900000
end
