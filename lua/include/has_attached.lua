-- @include split_sids
-- Tell whether a user has a connection that is not detached.
local function has_attached(key_prefix, last_seen_key, user_id)
  local sids = split_sids(redis.call('GET', key_prefix .. 'user_conns:' .. user_id))
  -- The newest is the likeliest.
  for index = #sids, 1, -1 do
    local score = redis.call('ZSCORE', last_seen_key, sids[index])
    if score and tonumber(score) >= 0 then
      return true
    end
  end
  return false
end
