-- Tell whether this is the first registration in its 1,000 seconds, or in last_seen: it refreshes the TTL of last_seen
-- for the others, all of which keys outlive by a day. The first 7 digits of a time in us are its thousands of seconds.
local function needs_ttl(last_epoch_score, time_us)
  return not last_epoch_score or string.sub(last_epoch_score, 2, 8) ~= string.sub(time_us, 1, 7)
end
