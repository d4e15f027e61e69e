-- Tell whether this is the first registration in its quarter of conn_ttl_ms, which refreshes the TTL of last_seen for
-- the others in it. It is also where last_seen was just made, since it lives as long as the last epoch in it.
local function needs_ttl(last_epoch_score, time_us, conn_ttl_ms)
  local span_us = conn_ttl_ms * 250
  return not last_epoch_score or math.floor(-last_epoch_score / span_us) ~= math.floor(time_us / span_us)
end
