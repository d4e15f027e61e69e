-- @include kept_ms
-- Keep the answer of this call for a minute. Gives nil when the call may go on and write. If it had run before, gives
-- what it answered then, and it must write nothing.
local function answer_once(reply_key, answer)
  local earlier = redis.call('SET', reply_key, cmsgpack.pack(answer), 'NX', 'GET', 'PX', kept_ms)
  return earlier and cmsgpack.unpack(earlier) or nil
end
