-- The scores in last_seen of the sids, in their order; false for a sid that is not there.
local function last_seen_scores(last_seen_key, sids)
  if #sids == 0 then
    return {}
  end
  if #sids <= 1000 then
    return redis.call('ZMSCORE', last_seen_key, unpack(sids))
  end
  -- unpack puts every value on Lua's stack, which is bounded: 1,000 at a time.
  local scores = {}
  for first = 1, #sids, 1000 do
    local chunk = redis.call('ZMSCORE', last_seen_key, unpack(sids, first, math.min(first + 999, #sids)))
    for _, score in ipairs(chunk) do
      scores[#scores + 1] = score
    end
  end
  return scores
end
