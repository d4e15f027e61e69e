-- @include answer_once
-- Answer a call that has found nothing to do. With keep (the call may have been sent before, or others follow it in a
-- pipeline), this answer is kept as well: otherwise a first copy that was only held up on the way would act after the
-- caller was told that there was nothing to do. If this very call has run before (its reply was lost, and it was sent
-- again), gives what it answered then.
local function answer_nothing(reply_key, keep, answer)
  if keep ~= '' then
    return answer_once(reply_key, answer) or answer
  end
  local earlier = redis.call('GET', reply_key)
  return earlier and cmsgpack.unpack(earlier) or answer
end
