-- @include read_connection
-- Find a connection that is live, or detached and within its grace, and tell whether it is detached. Nil when it is
-- unknown, expired or past its grace.
local function find_connection(conn_key, last_seen_key, sid, now, conn_ttl_ms)
  local score = redis.call('ZSCORE', last_seen_key, sid)
  local seen = score and tonumber(score)
  if not seen or (seen >= 0 and seen < now - conn_ttl_ms) or (seen < 0 and -seen < tonumber(now)) then
    return nil
  end
  return read_connection(conn_key, sid, score), seen < 0
end
