-- @include kept_ms
-- Tell whether the call whose answer is kept in a user's list from first on (see split_sids) may be sent again. The
-- answer begins, behind the 16 characters of its token, with the time in us, of which these are the digits down to the
-- ms.
local function is_recent(list, first, now_ms)
  local answered_at = list:sub(first + 16, first + 28)
  return answered_at ~= '' and now_ms - answered_at < tonumber(kept_ms)
end
