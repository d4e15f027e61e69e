-- With what chance a heartbeat refreshes the TTLs: the time since the one before, in parts of 15 minutes. So beside no
-- more than a clock they are refreshed about once in 15 minutes, however often the heartbeats come, and always after a
-- longer silence. Keys outlive their connections by a day: that all heartbeats of one miss is less likely than e^-92.
local function refresh_chance(silence_ms)
  return silence_ms / 900000
end
