-- What this same call answered before (its reply was lost, and it was sent again), or nil.
local function earlier_answer(reply_key)
  local earlier = redis.call('GET', reply_key)
  return earlier and cmsgpack.unpack(earlier) or nil
end
