-- One event as it is published: '<kind> <length of the sid> <length of the record> <score> <sid><record>', with the
-- connection as it is now or, of one that is gone or has left, as it was.
local function event(kind, sid, record, score)
  return kind .. ' ' .. #sid .. ' ' .. #record .. ' ' .. score .. ' ' .. sid .. record
end
