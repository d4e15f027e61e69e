-- Find a connection that is live, or detached and within its grace: its record, its score in last_seen, and whether it
-- is detached. Nil when it is unknown, expired or past its grace.
-- The score is the last heartbeat in ms or, of a detached connection, minus the end of its grace.
local function find_record(conn_key, last_seen_key, sid, now_ms, conn_ttl_ms)
  local score = redis.call('ZSCORE', last_seen_key, sid)
  local seen = score and tonumber(score)
  if not seen or (seen >= 0 and seen < now_ms - conn_ttl_ms) or (seen < 0 and -seen < tonumber(now_ms)) then
    return nil
  end
  -- If records are evicted, only the score may be left.
  return redis.call('GET', conn_key) or nil, score, seen < 0
end
