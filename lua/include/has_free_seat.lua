-- @include last_seen_scores
-- Tell whether fewer than capacity connections hold a seat in the game: live ones, and detached ones in their grace.
local function has_free_seat(game_conns_key, last_seen_key, capacity, now_ms, conn_ttl_ms)
  if redis.call('HLEN', game_conns_key) < capacity then
    return true
  end
  local taken = 0
  for _, score in ipairs(last_seen_scores(last_seen_key, redis.call('HKEYS', game_conns_key))) do
    local seen = score and tonumber(score)
    if seen and (seen >= now_ms - conn_ttl_ms or -seen >= tonumber(now_ms)) then
      taken = taken + 1
    end
  end
  return taken < capacity
end
